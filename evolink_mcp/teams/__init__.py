"""The parts that only a team needs: PostgreSQL, tokens, OAuth, the object store, uploads, callbacks and metrics."""

"""EvoLink's image API: what its page says (pure, no I/O), then how it is called over HTTP."""

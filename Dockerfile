# docker build -t evolink-mcp .
# docker run -i --rm -e EVOLINK_API_KEY -v evolink:/data evolink-mcp
FROM python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b AS build
ARG EXTRAS=""
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY .github/release/image*.txt hashes/
COPY evolink_mcp evolink_mcp
RUN python -m venv /opt/evolink-mcp \
 && /opt/evolink-mcp/bin/pip install --no-cache-dir --compile --require-hashes --only-binary :all: -r "hashes/image${EXTRAS}.txt" \
 && /opt/evolink-mcp/bin/pip install --no-cache-dir --compile --no-deps --no-build-isolation ".${EXTRAS}"

FROM python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b
LABEL io.modelcontextprotocol.server.name="io.github.evolink-mcp/evolink-mcp" \
      org.opencontainers.image.title="EvoLink Images" \
      org.opencontainers.image.source="https://github.com/evolink-mcp/evolink-mcp" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /opt/evolink-mcp /opt/evolink-mcp
RUN useradd --create-home --uid 10001 evolink && install -d -o evolink -g evolink -m 700 /data /pictures
USER evolink
WORKDIR /data
ENV PATH=/opt/evolink-mcp/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    EVOLINK_MCP_DATA_DIR=/data/journal \
    EVOLINK_MCP_OUTPUT_DIR=/data/pictures
VOLUME /data
# Over stdio the server has no port: the container is healthy while the process runs.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "-c", "\
import pathlib, urllib.request; \
words = pathlib.Path('/proc/1/cmdline').read_text().split('\\0'); \
port = words[words.index('--port') + 1] if '--port' in words else '8000'; \
{'http', 'sse'} & set(words) and urllib.request.urlopen(f'http://127.0.0.1:{port}/healthz', timeout=4)"]
ENTRYPOINT ["evolink-mcp"]

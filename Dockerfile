# docker build -t evolink-mcp .
# docker run -i --rm -e EVOLINK_API_KEY -v evolink:/data evolink-mcp
FROM python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b AS build
ARG EXTRAS=""
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY evolink_mcp evolink_mcp
RUN python -m venv /opt/evolink-mcp \
 && /opt/evolink-mcp/bin/pip install --no-cache-dir --compile ".${EXTRAS}"

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
ENTRYPOINT ["evolink-mcp"]

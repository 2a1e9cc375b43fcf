// The TypeScript client 2.x, with the older handshake (legacy) or with negotiation (auto).
import { Client, SSEClientTransport, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";
import { drive, target } from "./calls.mjs";

const { transport, command, args, env, url, mode } = target;
const client = new Client({ name: "evolink-mcp-check", version: "1.0.0" }, { versionNegotiation: { mode } });
if (transport === "stdio") await client.connect(new StdioClientTransport({ command, args, env }));
else if (transport === "http") await client.connect(new StreamableHTTPClientTransport(new URL(url)));
else await client.connect(new SSEClientTransport(new URL(url)));
await drive("@modelcontextprotocol/client", client, (params, options) => client.callTool(params, options));

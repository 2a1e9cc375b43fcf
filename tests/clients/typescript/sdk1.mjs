// The TypeScript SDK 1.x: `Client` over its three transports.
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { SSEClientTransport } from "@modelcontextprotocol/sdk/client/sse.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { drive, target } from "./calls.mjs";

const { transport, command, args, env, url } = target;
const client = new Client({ name: "evolink-mcp-check", version: "1.0.0" });
if (transport === "stdio") await client.connect(new StdioClientTransport({ command, args, env }));
else if (transport === "http") await client.connect(new StreamableHTTPClientTransport(new URL(url)));
else await client.connect(new SSEClientTransport(new URL(url)));
await drive("@modelcontextprotocol/sdk", client, (params, options) => client.callTool(params, undefined, options));

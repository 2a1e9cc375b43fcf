// openai-agents for JavaScript: an agent with an MCP server, in the strict form of OpenAI.
import { Agent, MCPServerStdio, OpenAIChatCompletionsModel, run, setTracingDisabled } from "@openai/agents";
import OpenAI from "openai";
import { ORDER, report, target } from "./order.mjs";

const { command, args, env, model_url } = target;
setTracingDisabled(true);
const server = new MCPServerStdio({ command, args, env, clientSessionTimeoutSeconds: 120 });
await server.connect();
const client = new OpenAI({ apiKey: "sk-no-key", baseURL: `${model_url}/v1` });
const model = new OpenAIChatCompletionsModel(client, "fake");
await run(new Agent({ name: "painter", model, mcpServers: [server] }), ORDER);
await server.close();
report("@openai/agents");

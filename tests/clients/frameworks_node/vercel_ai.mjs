// The Vercel AI SDK: generateText with the tools of its MCP client, for OpenAI (strict) or Gemini.
import { createGoogleGenerativeAI } from "@ai-sdk/google";
import { createMCPClient } from "@ai-sdk/mcp";
import { Experimental_StdioMCPTransport as StdioTransport } from "@ai-sdk/mcp/mcp-stdio";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs } from "ai";
import { ORDER, report, target } from "./order.mjs";

const { command, args, env, mode, model_url } = target;
// Its discovery waits one second. A server that starts on a busy machine takes longer.
const client = await createMCPClient({ transport: new StdioTransport({ command, args, env }), protocolVersionDiscovery: false });
const tools = await client.tools();
const model = {
  chat: () => createOpenAI({ apiKey: "sk-no-key", baseURL: `${model_url}/v1` }).chat("fake"),
  responses: () => createOpenAI({ apiKey: "sk-no-key", baseURL: `${model_url}/v1` }).responses("fake"),
  gemini: () => createGoogleGenerativeAI({ apiKey: "sk-no-key", baseURL: `${model_url}/v1beta` })("gemini-fake"),
}[mode]();
await generateText({ model, tools, prompt: ORDER, stopWhen: stepCountIs(3) });
await client.close();
report("ai");

// The four calls of every client, and its report: one line of JSON on stdout, which drive.py checks.
import { readFileSync } from "node:fs";

export const target = JSON.parse(process.argv[2]);
const prompt = target.prompt;

const answerOf = (result, more = {}) => ({
  text: result.content.filter((block) => block.type === "text").map((block) => block.text).join("\n"),
  structured: result.structuredContent ?? null,
  error: Boolean(result.isError),
  ...more,
});

export async function drive(name, client, call) {
  const tools = (await client.listTools()).tools.map((tool) => tool.name);
  const reports = [];
  const size = answerOf(await call({ name: "compute_size", arguments: { size: "16:9", resolution: "2K" } }));
  const onprogress = (notification) => reports.push(notification.progress);
  const image = answerOf(await call({ name: "generate_image", arguments: { prompt, n: 1 } }, { onprogress }), { progress: reports });
  const bad = answerOf(await call({ name: "generate_image", arguments: { prompt, promt: "a typing error" } }));
  // The client cancels this call after three seconds and repeats it. The repeat must get the first purchase.
  const slow = { name: "generate_image", arguments: { prompt: target.slow, n: 1 } };
  const gaveUp = await call(slow, { timeout: 3000 }).then(() => false, () => true);
  const again = answerOf(await call(slow), { gaveUp });
  const version = JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
  const protocol = client.getNegotiatedProtocolVersion?.() ?? client.transport?.protocolVersion ?? "";
  await client.close();
  console.log("\nREPORT " + JSON.stringify({ version: `${name} ${version}`, protocol, tools, size, image, bad, again }));
}

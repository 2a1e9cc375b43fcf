// Test the gallery page with the real server, a simulated EvoLink, the official App bridge and headless Chromium.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { appendFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { Client } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";
import { build } from "esbuild";
import { chromium } from "playwright-core";

const [python, shots] = process.argv.slice(2);
const root = resolve(import.meta.dirname, "../..");
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const SECONDS = 2; // duration of a task at the simulated EvoLink
const SHOWN_WITHIN_MS = 1000;
const LONGEST_S = 480;
const SHEET = [["light", 360], ["dark", 360], ["light", 720], ["dark", 720]];
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const URI = "ui://evolink/gallery.html";
const LOOKS = join(import.meta.dirname, "looks.json");
const MIME = "text/html;profile=mcp-app";
// The content policy for an App without permissions (the default of the specification).
const POLICY =
  "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; " +
  "img-src 'self' data:; media-src 'self' data:; connect-src 'none'; frame-src 'none'; object-src 'none'; base-uri 'self'";
const CHAT = `<!doctype html><html lang="en"><meta charset="utf-8"><title>Chat</title><style>
  body { margin: 0; padding: 20px; background: #fff; font: 15px/1.5 system-ui, sans-serif }
  html[data-theme=dark] body { background: #151413 }
  iframe { border: 1px solid #8883; border-radius: 14px; display: block; height: 120px }
</style><main id="app"></main><script src="/host.js"></script></html>`;

let passed = 0;
let failed = 0;
const states = []; // of the contact sheet
const started = Date.now();
const complaints = [];

async function check(name, act) {
  try {
    const remark = await act();
    passed += 1;
    console.log(`ok    ${name}${typeof remark === "string" ? ` (${remark})` : ""}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL  ${name}\n      ${String(error.message ?? error).split("\n").slice(0, 12).join("\n      ")}`);
  }
}

async function served(answer) {
  const server = createServer((request, response) => {
    const [type, body, headers = {}] = answer(request.url);
    response.writeHead(200, { "content-type": type, ...headers }).end(body);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return { origin: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}

async function freePort() {
  const probe = createServer().listen(0, "127.0.0.1");
  await once(probe, "listening");
  const { port } = probe.address();
  probe.close();
  await once(probe, "close");
  return port;
}

async function simulator() {
  const port = await freePort();
  const child = spawn(python, ["-P", "-m", "evolink_mcp", "simulate", "--port", port, "--seconds", SECONDS], {
    cwd: root,
    stdio: ["ignore", "ignore", "inherit"],
  });
  const url = `http://127.0.0.1:${port}`;
  for (let tries = 0; ; tries += 1) {
    try {
      await fetch(`${url}/v1/credits`);
      return { url, stop: () => child.kill() };
    } catch (error) {
      if (tries > 100 || child.exitCode !== null) throw error;
      await new Promise((done) => setTimeout(done, 100));
    }
  }
}

async function connected(mode, evolink, home) {
  const client = new Client(
    { name: "gallery checks", version: "1.0.0" },
    {
      versionNegotiation: { mode },
      capabilities: { extensions: { "io.modelcontextprotocol/ui": { mimeTypes: [MIME] } } },
    },
  );
  const transport = new StdioClientTransport({
    command: python,
    args: ["-P", "-m", "evolink_mcp"],
    cwd: root,
    env: { HOME: home, PATH: process.env.PATH, EVOLINK_BASE_URL: evolink, EVOLINK_API_KEY: "sk-simulated" },
    stderr: "inherit",
  });
  await client.connect(transport);
  return client;
}

async function audited(frame, name) {
  await frame.evaluate(axe);
  const { violations, passes } = await frame.evaluate(() => axe.run(document));
  const messages = violations.map((v) => `${v.id}: ${v.help}: ${v.nodes.map((n) => n.html.slice(0, 120)).join(" | ")}`);
  assert.deepEqual(messages, [], `${name}: ${messages.join("\n")}`);
  return `${passes.length} rules passed`;
}

async function underOneEra(mode, evolink, hostScript) {
  // One browser per era: both run at the same time, and each needs its own clipboard.
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
  const home = mkdtempSync("/tmp/gallery-"); // the page shows paths: they have the same length on every machine
  const client = await connected(mode, evolink, home);
  const era = client.getNegotiatedProtocolVersion?.() ?? mode;
  const name = (text) => `${mode === "legacy" ? "legacy" : "modern"}: ${text}`;
  let html = "";
  const view = await served(() => ["text/html; charset=utf-8", html, { "content-security-policy": POLICY }]);
  const chat = await served((url) =>
    url === "/" ? ["text/html; charset=utf-8", CHAT] : url === "/host.js" ? ["text/javascript", hostScript] : ["text/plain", ""]);
  const page = await (await browser.newContext({ permissions: ["clipboard-read"], viewport: { width: 860, height: 900 }, deviceScaleFactor: 1 })).newPage();
  page.setDefaultTimeout(10_000);
  page.on("console", (m) => {
    // Chromium prints this warning for each frame with the attributes of the specification.
    if (!["error", "warning"].includes(m.type()) || m.text().startsWith("An iframe which has both allow-scripts and")) return;
    complaints.push(`${mode} ${m.type()}: ${m.text()}`);
  });
  page.on("pageerror", (error) => complaints.push(`${mode}: ${error.message}`));
  await page.exposeFunction("toServer", (method, params) => client.request({ method, params }, { timeout: 300_000 }));
  await page.goto(chat.origin);

  let tool;
  const frame = () => page.frames().find((one) => one.url().startsWith(view.origin));
  const app = () => page.frameLocator("iframe");
  const opened = (more = {}) =>
    page.evaluate((o) => openApp(o), { url: view.origin, theme: "light", tool, width: 820, ...more });
  const shot = async (file) => {
    await page.waitForTimeout(450); // let pictures fade in
    await page.locator("iframe").screenshot({ path: join(shots, `${mode === "legacy" ? "legacy-" : ""}${file}.png`) });
  };
  // One state of the page in every theme and width, for the contact sheet.
  const pictured = async (state) => {
    if (mode === "legacy") return;
    states.push(state);
    for (const [theme, width] of SHEET) {
      await page.evaluate(([t, w]) => (sizeApp(w), dressApp(t)), [theme, width]);
      await page.waitForTimeout(200);
      const [scroll, inner] = await frame().evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
      assert.ok(scroll <= inner, `${state} at ${width}: content ${scroll}, frame ${inner}`);
      await page.locator("iframe").screenshot({ path: join(shots, "states", `${state}-${theme}-${width}.png`) });
    }
    await page.evaluate(() => (sizeApp(820), dressApp("light")));
    await page.waitForTimeout(200);
  };
  const allShown = (n) =>
    frame().waitForFunction(
      (wanted) => {
        const pictures = [...document.querySelectorAll("#grid img")];
        return pictures.length === wanted && pictures.every((p) => p.complete && p.naturalWidth > 0 && p.src.startsWith("data:image/"));
      },
      n,
      { timeout: 300_000, polling: 20 },
    );

  await check(name(`the tool names the page and the page has the App type (protocol ${era})`), async () => {
    const { tools } = await client.request({ method: "tools/list", params: {} });
    tool = tools.find((one) => one.name === "generate_image");
    assert.equal(tool._meta.ui.resourceUri, URI);
    const { contents } = await client.request({ method: "resources/read", params: { uri: URI } });
    assert.equal(contents[0].mimeType, MIME);
    html = contents[0].text;
  });

  await check(name("the page initialises under the official bridge and the default content policy"), async () => {
    const info = await opened();
    assert.equal(info.name, "evolink-gallery");
  });

  const wish = { prompt: "A quiet harbour at dawn, mist over the water", n: 2, size: "3:2" };
  await check(name("a running task shows its title, with a busy bar and empty frames"), async () => {
    await page.evaluate((w) => { window.pending = callTool("generate_image", w); }, wish);
    await app().getByRole("heading", { name: "Making 2 pictures" }).waitFor();
    await app().getByRole("progressbar").waitFor();
    assert.equal(await app().locator("#grid li").count(), 2);
    await app().getByText(wish.prompt).first().waitFor();
    await app().getByText(/\b[1-9]\d* s · usually 48 s$/).waitFor();
    await shot("working-light");
    return await audited(frame(), "working");
  });

  await check(name("two finished pictures are shown within a second of the answer"), async () => {
    await page.evaluate(() => window.pending);
    await allShown(2);
    const took = await page.evaluate(() => performance.now() - resultAt);
    assert.ok(took < SHOWN_WITHIN_MS, `took ${took.toFixed(0)} ms`);
    await app().getByRole("heading", { name: "2 pictures" }).waitFor();
    return `${took.toFixed(0)} ms`;
  });

  await check(name("and these are the full pictures, read through the host, not the previews of the answer"), async () => {
    await frame().waitForFunction(() => [...document.querySelectorAll("#grid img")].every((one) => one.naturalWidth === 1536), null, { polling: 20 });
    const took = await page.evaluate(() => performance.now() - resultAt);
    assert.ok(took < SHOWN_WITHIN_MS, `took ${took.toFixed(0)} ms`);
    return `${took.toFixed(0)} ms`;
  });

  await check(name("the frame is as high as its content"), async () => {
    await page.waitForTimeout(300);
    const [scroll, inner] = await frame().evaluate(() => [document.documentElement.scrollHeight, innerHeight]);
    assert.ok(Math.abs(scroll - inner) <= 1, `content ${scroll}, frame ${inner}`);
  });

  await check(name("no accessibility violation in light"), () => audited(frame(), "light"));
  await shot("light-wide");
  await check(name("no accessibility violation in dark"), async () => {
    await page.evaluate(() => dressApp("dark"));
    await page.waitForTimeout(250);
    return audited(frame(), "dark");
  });
  await shot("dark-wide");
  await check(name("nothing is cut off at 320 pixels"), async () => {
    await page.evaluate(() => sizeApp(320));
    await page.waitForTimeout(250);
    const [scroll, inner] = await frame().evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert.ok(scroll <= inner, `content ${scroll}, frame ${inner}`);
    await audited(frame(), "narrow");
  });
  await shot("dark-narrow");
  await page.evaluate(() => dressApp("light"));
  await shot("light-narrow");
  await check(name("the buttons of two pictures are in one row, all at 720 pixels and the most used ones at 360"), async () => {
    for (const [width, buttons] of [[720, 5], [360, 2]]) {
      await page.evaluate(width => sizeApp(width), width);
      await page.waitForTimeout(250);
      const rows = await frame().evaluate(() => [...document.querySelectorAll("#grid .acts")].map(acts => {
        const tops = [...acts.children].filter(button => button.offsetParent).map(button => button.offsetTop);
        return [tops.length, new Set(tops).size];
      }));
      assert.deepEqual(rows, [[buttons, 1], [buttons, 1]]);
    }
  });
  await page.evaluate(() => sizeApp(820));
  await check(name("two pictures look right in every theme and width"), () => pictured("two pictures"));

  await check(name("“Edit this one” puts a message with the picture's address and prompt into the chat"), async () => {
    await app().getByRole("button", { name: "Edit this one: picture 2" }).click();
    await page.waitForFunction(() => seen.messages.length === 1);
    const [{ role, content }] = await page.evaluate(() => seen.messages);
    assert.equal(role, "user");
    assert.match(content[0].text, /evolink:\/\/images\/task-unified-\S+\/1\b/);
    assert.ok(content[0].text.includes(wish.prompt));
    await app().getByRole("status").getByText("Sent to the chat").waitFor({ state: "attached" });
  });
  await check(name("“Another like it” does too"), async () => {
    await app().getByRole("button", { name: "Another like it: picture 1" }).click();
    await page.waitForFunction(() => seen.messages.length === 2);
    const text = await page.evaluate(() => seen.messages[1].content[0].text);
    assert.match(text, /evolink:\/\/images\/task-unified-\S+\/0\b/);
    assert.ok(text.includes(wish.prompt));
  });
  await check(name("the path is copied and the link is opened by the host"), async () => {
    await app().getByRole("button", { name: "Copy path: picture 1" }).click();
    await app().getByRole("status").getByText("Copied").waitFor({ state: "attached" });
    await page.bringToFront();
    await page.evaluate(() => window.focus());
    assert.match(await page.evaluate(() => navigator.clipboard.readText()), /Pictures.*quiet-harbour-\S+\.png$/);
    await app().getByRole("button", { name: "Copy folder" }).click();
    await page.waitForFunction(async () => /Pictures.EvoLink[^/\\]*[/\\]$/.test(await navigator.clipboard.readText()));
    await app().getByRole("button", { name: "Open link: picture 1" }).click();
    await page.waitForFunction(() => seen.links.length === 1);
    assert.match(await page.evaluate(() => seen.links[0].url), /\/pictures\/task-unified-\S+\/1\.png$/);
  });
  await check(name("a download hands the host the whole file under its name"), async () => {
    await app().getByRole("button", { name: "Download: picture 2" }).click();
    await page.waitForFunction(() => seen.downloads.length === 1);
    const [{ contents: [{ type, resource }] }] = await page.evaluate(() => seen.downloads);
    assert.deepEqual([type, resource.mimeType], ["resource", "image/png"]);
    assert.match(resource.uri, /^file:\/\/\/quiet-harbour-[^/]+\.png$/);
    assert.equal(Buffer.from(resource.blob, "base64").subarray(1, 4).toString(), "PNG");
    await app().getByRole("status").getByText("Downloaded").waitFor({ state: "attached" });
  });
  await check(name("the large view opens, turns and closes by keyboard and gives the focus back"), async () => {
    const open = app().getByRole("button", { name: "Open picture 1 large" });
    await open.focus();
    await page.keyboard.press("Enter");
    const dialog = app().getByRole("dialog", { name: /Picture 1 of 2/ });
    await dialog.waitFor();
    await page.keyboard.press("ArrowRight");
    await app().getByRole("dialog", { name: /Picture 2 of 2/ }).waitFor();
    await audited(frame(), "large");
    await shot("large-light");
    await pictured("large");
    await app().getByRole("button", { name: "Edit this one: picture 2" }).last().waitFor();
    await page.keyboard.press("Home");
    await app().getByRole("dialog", { name: /Picture 1 of 2/ }).waitFor();
    await page.keyboard.press("z");
    await app().getByRole("button", { name: "100 %", pressed: true }).waitFor();
    const real = () => app().locator("#whole").evaluate((one) => [one.offsetWidth, one.naturalWidth]);
    const [shown, natural] = await real();
    assert.equal(shown, natural, "not its own pixels");
    await page.keyboard.press("ArrowRight"); // scrolls
    await app().getByRole("dialog", { name: /Picture 1 of 2/ }).waitFor();
    await audited(frame(), "zoomed");
    await pictured("large at 100 percent");
    await page.keyboard.press("z");
    await app().getByRole("button", { name: "100 %", pressed: false }).waitFor();
    assert.ok((await real())[0] < natural, "still larger than its pane");
    await page.keyboard.press("Escape");
    await app().getByRole("dialog").waitFor({ state: "hidden" });
    assert.ok(await open.evaluate((node) => node === document.activeElement), "the focus moved to another element");
  });
  await page.evaluate(() => closeApp());

  await check(name("a handle is followed by get_task alone until the pictures are there"), async () => {
    await page.evaluate(() => Object.values(seen).forEach((list) => (list.length = 0)));
    await opened({ theme: "dark" });
    await page.evaluate(() => { document.documentElement.dataset.theme = "dark"; });
    const handle = await page.evaluate(() => callTool("generate_image", { prompt: "sim:slow=9 A fox in the snow", n: 2, wait_seconds: 0 }));
    assert.equal(handle.structuredContent.next_action.tool, "get_task");
    await frame().waitForFunction(() => document.getElementById("bar").ariaValueNow > 0, null, { timeout: 300_000 });
    await app().getByText(/\d+ % · \d+ s/).waitFor();
    await audited(frame(), "progress");
    await shot("progress-dark");
    await pictured("in progress");
    await allShown(2);
    const [calls, took, context] = await page.evaluate(() => [seen.calls, performance.now() - seen.answers.at(-1).at, seen.contexts]);
    assert.deepEqual([...new Set(calls.map((call) => call.name))], ["get_task"]);
    assert.ok(calls.every((call) => call.arguments.wait_seconds <= 20));
    assert.ok(took < SHOWN_WITHIN_MS, `took ${took.toFixed(0)} ms`);
    assert.match(context[0].content[0].text, /completed.*evolink:\/\/images\//);
    return `${calls.length} polls, shown after ${took.toFixed(0)} ms`;
  });
  await page.evaluate(() => closeApp());

  await check(name("a failed task shows its reason and that nothing was charged"), async () => {
    await opened({ theme: "light" });
    await page.evaluate(() => { document.documentElement.dataset.theme = "light"; });
    const answer = await page.evaluate(() => callTool("generate_image", { prompt: "sim:fast sim:fail A crowd at a concert" }));
    assert.equal(answer.isError, true);
    await app().getByRole("heading", { name: "No picture was made" }).waitFor();
    const text = await app().getByRole("region", { name: "What went wrong" }).innerText();
    assert.ok(text.toLowerCase().includes(answer.structuredContent.error.message.slice(0, 30).toLowerCase()), text);
    assert.ok(text.includes("Nothing was charged."), text);
    await shot("failed-light");
    await audited(frame(), "failed in light");
    await page.evaluate(() => dressApp("dark"));
    await page.waitForTimeout(250);
    await audited(frame(), "failed in dark");
    await shot("failed-dark");
    await pictured("failed");
  });
  await page.evaluate(() => closeApp());

  await check(name("sentences for the model are not shown"), async () => {
    await opened();
    const error = { code: "x", message: "EvoLink did not answer.", advice: "Nothing is lost. Call get_task later.", retryable: true };
    const notes = ["The picture is 1,024 × 1,024. Call generate_image with size 1:1.", "Tell the user what it cost.",
      "The pixels of the account's pictures follow EvoLink's anchor-edge table. Sizes and prices of this account are computed by it from now on."];
    const data = { status: "unknown", task_id: "task-unified-1-abcdefgh", images: [], charged: "unknown", error, notes };
    await page.evaluate((structuredContent) => tellApp("sendToolResult", { content: [{ type: "text", text: "x" }], structuredContent }), data);
    await app().getByText("Nothing is lost.").waitFor();
    await app().getByText("The picture is 1,024 × 1,024.").waitFor();
    const text = await app().locator("main").innerText();
    assert.ok(!/get_task|generate_image|the user|anchor-edge|computed by it/.test(text), text);
    await pictured("something went wrong");
  });
  await page.evaluate(() => closeApp());

  await check(name("a call that the host stopped is explained"), async () => {
    await opened();
    await page.evaluate(() => tellApp("sendToolInput", { arguments: { prompt: "A fox in the snow" } }));
    await app().getByRole("heading", { name: "Making your picture" }).waitFor();
    await pictured("working");
    await page.evaluate(() => tellApp("sendToolCancelled", { reason: "the user stopped it" }));
    await app().getByRole("heading", { name: "This call was stopped" }).waitFor();
    await audited(frame(), "stopped");
    await pictured("stopped");
    await frame().evaluate(() => show("lost")); // a minute of failures in truth
    await app().getByRole("heading", { name: "No answer for a while" }).waitFor();
    await audited(frame(), "lost");
    await pictured("no answer");
  });
  await page.evaluate(() => closeApp());

  await check(name("a task without pictures, and an answer with text only, are shown"), async () => {
    await opened();
    await pictured("before any call");
    const empty = { status: "completed", task_id: "task-unified-1-abcdefgh", images: [], charged: "yes", credits: 1.5, usd: 0.0221, notes: [] };
    await page.evaluate((structuredContent) => tellApp("sendToolResult", { content: [{ type: "text", text: "x" }], structuredContent }), empty);
    await app().getByRole("heading", { name: "No picture was delivered" }).waitFor();
    await app().getByText("1.5 credits ($0.0221) were charged.", { exact: true }).waitFor();
    await pictured("no picture delivered");
    await page.evaluate(() => tellApp("sendToolResult", { content: [{ type: "text", text: "EVOLINK_API_KEY is not set." }] }));
    await app().getByText("EVOLINK_API_KEY is not set.", { exact: true }).waitFor();
    await pictured("only text");
  });
  await page.evaluate(() => closeApp());

  await check(name("an edit names its original and is compared with it"), async () => {
    await opened();
    const first = await client.request({ method: "tools/call", params: { name: "generate_image", arguments: { prompt: "sim:fast A red bicycle" } } });
    const { images: [{ resource_uri }] } = first.structuredContent;
    await page.evaluate((one) => callTool("generate_image", { prompt: "sim:fast The bicycle in blue", image_urls: [one] }), resource_uri);
    await allShown(1);
    await app().getByText("Edited from an earlier picture").waitFor();
    const link = app().getByRole("button", { name: "an earlier picture" });
    await link.waitFor();
    await pictured("an edit");
    await audited(frame(), "edit");
    const source = () => app().locator("#whole").evaluate((one) => one.src);
    await link.click();
    await app().getByRole("button", { name: "Before the edit", pressed: true }).waitFor();
    const before = await source();
    const { contents: [file] } = await client.request({ method: "resources/read", params: { uri: resource_uri } });
    assert.equal(before, `data:${file.mimeType};base64,${file.blob}`);
    await page.keyboard.press("b");
    await app().getByRole("button", { name: "Before the edit", pressed: false }).waitFor();
    assert.notEqual(await source(), before);
    await app().getByRole("button", { name: "Before the edit" }).click();
    await app().getByRole("img", { name: "The picture before the edit" }).waitFor();
    await audited(frame(), "before the edit");
    await pictured("before the edit");
    await page.keyboard.press("Escape");
    await app().getByRole("dialog").waitFor({ state: "hidden" });
    assert.ok(await link.evaluate((node) => node === document.activeElement), "the focus moved to another element");
  });
  await page.evaluate(() => closeApp());

  await check(name("a single wide picture keeps its shape, and the large view asks the host for the full screen"), async () => {
    await page.evaluate(() => Object.values(seen).forEach((list) => (list.length = 0)));
    await opened({ modes: ["inline", "fullscreen"] });
    await page.evaluate(() => dressApp("light"));
    await page.evaluate(() => callTool("generate_image", { prompt: "sim:fast A lighthouse above a calm sea", size: "16:9" }));
    await allShown(1);
    await app().getByRole("heading", { name: "Your picture" }).waitFor();
    const { width, height } = await app().locator(".pic").boundingBox();
    assert.ok(Math.abs(width / height - 16 / 9) < 0.01, `${width} by ${height}`);
    await shot("one-light");
    await pictured("one picture");
    await app().getByRole("button", { name: "Open picture 1 large" }).click();
    await app().getByRole("button", { name: "Close" }).click();
    await page.waitForFunction(() => seen.modes.join() === "fullscreen,inline");
  });
  await page.evaluate(() => closeApp());

  await check(name("a user on another machine sees the picture and its link, and no path"), async () => {
    await page.evaluate(() => Object.values(seen).forEach((list) => (list.length = 0)));
    const made = await client.request({ method: "tools/call", params: { name: "generate_image", arguments: { prompt: "sim:fast A lake" } } });
    const { structuredContent: data, content } = made;
    Object.assign(data.images[0], { path: null, url: "https://store.example.org/team/lake.png?X-Amz-Signature=0" });
    await opened();
    await page.evaluate((answer) => tellApp("sendToolResult", answer), { structuredContent: data, content });
    await allShown(1);
    assert.equal(await app().getByRole("button", { name: "Copy path: picture 1" }).isVisible(), false);
    await app().getByRole("button", { name: "Download: picture 1" }).click();
    await page.waitForFunction(() => JSON.stringify(seen.downloads[0] ?? "").includes("file:///lake.png"));
    await app().getByRole("button", { name: "Open link: picture 1" }).click();
    await page.waitForFunction((url) => seen.links[0]?.url === url, data.images[0].url);
    await shot("elsewhere-light");
    await pictured("another machine");
    return await audited(frame(), "elsewhere");
  });
  await page.evaluate(() => closeApp());

  await check(name("a picture above the limit of one message shows its path, and its link"), async () => {
    await page.evaluate(() => Object.values(seen).forEach((list) => (list.length = 0)));
    const made = await client.request({ method: "tools/call", params: { name: "generate_image", arguments: { prompt: "sim:fast A mountain" } } });
    const { task_id, images: [image] } = made.structuredContent;
    appendFileSync(image.path, Buffer.alloc(7_100_000)); // decoders ignore bytes after the end of a PNG
    await opened();
    await page.evaluate((id) => callTool("get_task", { task_id: id }, true), task_id);
    await app().getByText("The picture cannot be shown here. It is saved at").waitFor();
    await app().locator(".away").getByText(image.path).waitFor();
    await app().getByRole("button", { name: "Open link: picture 1" }).click();
    await page.waitForFunction((url) => seen.links[0]?.url === url, image.url);
    await shot("too-large-light");
    await pictured("too large to show");
    return await audited(frame(), "too large");
  });
  await page.evaluate(() => closeApp());

  if (mode !== "legacy") {
    await check(name("ten pictures are all shown"), async () => {
      await opened();
      await page.evaluate(() => callTool("generate_image", { prompt: "sim:fast A garden in June", n: 10 }));
      await allShown(10);
      await shot("ten-light");
      await pictured("ten pictures");
    });
    await page.evaluate(() => closeApp());
  }

  if (mode !== "legacy") await check(name("the sheet finds a picture by a word of its prompt"), () => sheet(browser, home, evolink));

  await client.close();
  view.close();
  chat.close();
  await browser.close();
  rmSync(home, { recursive: true, force: true });
}

// The page of `evolink-mcp sheet` with the pictures of this run.
async function sheet(browser, home, evolink) {
  const file = join(home, "sheet.html");
  const env = { HOME: home, PATH: process.env.PATH, EVOLINK_BASE_URL: evolink, EVOLINK_API_KEY: "sk-simulated" };
  const child = spawn(python, ["-P", "-m", "evolink_mcp", "sheet", "--out", file], { cwd: root, env, stdio: ["ignore", "ignore", "inherit"] });
  assert.deepEqual(await once(child, "exit"), [0, null]);
  const page = await browser.newPage({ deviceScaleFactor: 1 });
  page.on("pageerror", (error) => complaints.push(`sheet: ${error.message}`));
  await page.goto(`file://${file}`);
  // A longer date needs a second line in a narrow window.
  await page.evaluate(() => document.querySelectorAll("h2").forEach((day) => (day.firstChild.textContent = "Sunday, 1 November 2026 ")));
  const seen = async (state) => {
    states.push(state);
    for (const [colorScheme, width] of SHEET) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize({ width, height: 800 });
      await page.evaluate(() => document.querySelectorAll("img").forEach((one) => (one.loading = "eager")));
      await page.waitForFunction(() => [...document.images].every((one) => one.complete && one.naturalWidth > 0));
      const [scroll, inner] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
      assert.ok(scroll <= inner, `${state} at ${width}: content ${scroll}, window ${inner}`);
      await page.screenshot({ path: join(shots, "states", `${state}-${colorScheme}-${width}.png`), fullPage: true });
    }
  };
  const count = () => page.locator("article:visible").count();
  const all = await count();
  assert.ok(all > 10, `only ${all} pictures`);
  await page.getByRole("searchbox").fill("BICYCLE");
  assert.equal(await count(), 2);
  await page.getByRole("combobox").selectOption("edit");
  assert.equal(await count(), 1);
  await page.getByRole("combobox").selectOption("");
  await seen("sheet with a search");
  await audited(page, "sheet");
  await page.getByRole("link", { name: /bicycle/ }).first().waitFor();
  await page.getByRole("searchbox").fill("zebra");
  await page.getByText("No image matches. Clear the search.").waitFor();
  await seen("sheet without a match");
  await page.close();
  return `${all} pictures`;
}

// The look of a screenshot as text: its size, and the brightness (0 to 9) of its fields of about 30 by 30 pixels.
function lookOf([url, columns]) {
  return new Promise((done, bad) => {
    const image = new Image();
    image.onerror = bad;
    image.onload = () => {
      const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
      const rows = (canvas.height = Math.round((columns * image.height) / image.width));
      canvas.width = columns;
      pen.imageSmoothingQuality = "high";
      // Halve the image until it is nearly small enough: one large step would skip pixels.
      let from = image, width = image.width, height = image.height;
      while (width > 2 * columns) {
        const half = document.createElement("canvas");
        half.width = width = Math.ceil(width / 2);
        half.height = height = Math.ceil(height / 2);
        half.getContext("2d").drawImage(from, 0, 0, width, height);
        from = half;
      }
      pen.drawImage(from, 0, 0, columns, rows);
      const { data } = pen.getImageData(0, 0, columns, rows);
      const level = (at) => Math.min(9, Math.floor((data[at] * 0.3 + data[at + 1] * 0.59 + data[at + 2] * 0.11) / 25.6));
      const lines = Array.from({ length: rows }, (_, y) => Array.from({ length: columns }, (_, x) => level(4 * (y * columns + x))).join(""));
      done({ width: image.width, height: image.height, lines });
    };
    image.src = url;
  });
}

// A look may differ a little, because other fonts have other shapes. A button in another row is more than that.
function difference(now, wanted) {
  if (!wanted) return "it is not in looks.json";
  if (Math.abs(now.width - wanted.width) > 2 || Math.abs(now.height - wanted.height) > Math.max(8, 0.02 * wanted.height))
    return `it is ${now.width} × ${now.height} pixels, and was ${wanted.width} × ${wanted.height}`;
  const pairs = now.lines.slice(0, wanted.lines.length).flatMap((line, y) => [...line].map((level, x) => Math.abs(level - (wanted.lines[y][x] ?? 0))));
  const changed = pairs.filter((one) => one > 1).length;
  return changed > 0.03 * pairs.length ? `${changed} of its ${pairs.length} fields have another brightness` : "";
}

// Compare every state with looks.json. EVOLINK_TEST_UPDATE=1 writes the file: look at the contact sheet before.
async function compared() {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
  const page = await browser.newPage();
  const looks = {};
  for (const state of states) {
    for (const [theme, width] of SHEET) {
      const data = readFileSync(join(shots, "states", `${state}-${theme}-${width}.png`)).toString("base64");
      looks[`${state}, ${theme}, ${width}`] = await page.evaluate(lookOf, [`data:image/png;base64,${data}`, width / 30]);
    }
  }
  await browser.close();
  if (process.env.EVOLINK_TEST_UPDATE) writeFileSync(LOOKS, `${JSON.stringify(looks, null, 1)}\n`);
  const wanted = JSON.parse(readFileSync(LOOKS, "utf8"));
  const names = [...new Set([...Object.keys(looks), ...Object.keys(wanted)])];
  const problems = names.map((name) => [name, looks[name] ? difference(looks[name], wanted[name]) : "this state was not seen"]);
  const lines = problems.filter(([, problem]) => problem).map(([name, problem]) => `${name}: ${problem}`);
  assert.equal(lines.length, 0, lines.join("\n"));
  return `${names.length} screenshots`;
}

// All states on one page, for a review before a release.
async function contactSheet() {
  const cells = (state) => SHEET.map(([theme, width]) => {
    const data = readFileSync(join(shots, "states", `${state}-${theme}-${width}.png`)).toString("base64");
    return `<figure><img src="data:image/png;base64,${data}" width="${width / 2}" alt=""><figcaption>${theme}, ${width}</figcaption></figure>`;
  });
  const html = `<!doctype html><meta charset="utf-8"><style>
    body { margin: 16px; background: #999; font: 13px system-ui, sans-serif }
    section { display: flex; gap: 12px; align-items: flex-start } figure { margin: 0 0 12px } h2 { margin: 16px 0 6px; font-size: 15px }
    </style>${states.map((state) => `<h2>${state}</h2><section>${cells(state).join("")}</section>`).join("")}`;
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
  const page = await browser.newPage({ viewport: { width: 1160, height: 900 } });
  await page.setContent(html);
  await page.screenshot({ path: join(shots, "contact-sheet.png"), fullPage: true });
  await browser.close();
  return `${states.length} states`;
}

// End the run if a check hangs.
setTimeout(() => {
  console.log(`FAIL  the checks took longer than ${LONGEST_S} s\n${passed} passed, ${failed + 1} failed`);
  process.exit(1);
}, LONGEST_S * 1000).unref();
mkdirSync(join(shots, "states"), { recursive: true });
const evolink = await simulator();
process.on("exit", evolink.stop);
const bundle = await build({ entryPoints: [join(import.meta.dirname, "host.js")], bundle: true, write: false, format: "iife", platform: "browser", logLevel: "error" });
try {
  const eras = ["auto", "legacy"].map((mode) => check(`${mode === "legacy" ? "legacy" : "modern"}: all steps ran`, () => underOneEra(mode, evolink.url, bundle.outputFiles[0].text)));
  await Promise.all(eras);
  await check("every state is on the contact sheet", contactSheet);
  await check("every state looks as before", compared);
  await check("no error and no warning in the console", () => assert.deepEqual(complaints, []));
} finally {
  evolink.stop();
}
console.log(`${passed} passed, ${failed} failed`);
console.error(`screenshots in ${shots}, ${((Date.now() - started) / 1000).toFixed(0)} s`);
process.exit(failed ? 1 : 0);

// A host with the official App bridge: a chat page with one App in a frame. Node forwards requests to the server.
import { AppBridge, PostMessageTransport } from "@modelcontextprotocol/ext-apps/app-bridge";

const ask = (method, params) => window.toServer(method, params);
const at = () => performance.now();

window.seen = { messages: [], links: [], contexts: [], modes: [], calls: [], answers: [], sizes: [], downloads: [] };

window.openApp = async ({ url, theme, tool, width, modes = ["inline"] }) => {
  const frame = document.createElement("iframe");
  frame.title = "App";
  frame.sandbox = "allow-scripts allow-same-origin";
  frame.allow = "clipboard-write";
  frame.style.width = `${width}px`;
  document.getElementById("app").replaceChildren(frame);
  const bridge = new AppBridge(
    null,
    { name: "test host", version: "1.0.0" },
    { openLinks: {}, downloadFile: {}, serverTools: {}, serverResources: {}, message: { text: {} }, updateModelContext: { text: {} } },
    { hostContext: { theme, displayMode: "inline", availableDisplayModes: modes, toolInfo: { tool }, locale: "en-GB" } },
  );
  bridge.oncalltool = async (params) => {
    seen.calls.push(params);
    const answer = await ask("tools/call", params);
    seen.answers.push({ at: at(), answer });
    return answer;
  };
  bridge.onreadresource = (params) => ask("resources/read", params);
  bridge.onmessage = async (params) => (seen.messages.push(params), {});
  bridge.onopenlink = async (params) => (seen.links.push(params), {});
  bridge.ondownloadfile = async (params) => (seen.downloads.push(params), {});
  bridge.onupdatemodelcontext = async (params) => (seen.contexts.push(params), {});
  bridge.onrequestdisplaymode = async ({ mode }) => (seen.modes.push(mode), { mode });
  bridge.onsizechange = ({ height }) => {
    seen.sizes.push(height);
    frame.style.height = `${height}px`;
  };
  const ready = new Promise((resolve, reject) => {
    bridge.oninitialized = resolve;
    setTimeout(reject, 5000, new Error("the page did not report that it is initialised"));
  });
  await bridge.connect(new PostMessageTransport(frame.contentWindow, frame.contentWindow));
  frame.src = url;
  await ready;
  window.bridge = bridge;
  return bridge.getAppVersion();
};

// Hosts send the input before the call and the result after it. `textOnly`: some hosts do not forward images.
window.callTool = async (name, args, textOnly = false) => {
  await bridge.sendToolInput({ arguments: args });
  const answer = await ask("tools/call", { name, arguments: args });
  if (textOnly) answer.content = answer.content.filter((block) => block.type === "text");
  window.resultAt = at();
  await bridge.sendToolResult(answer);
  return answer;
};
// Sends a state that only a host or a broken network can cause.
window.tellApp = (method, params) => bridge[method](params);
window.dressApp = (theme) => {
  document.documentElement.dataset.theme = theme;
  return bridge.sendHostContextChange({ theme });
};
window.sizeApp = (width) => (document.querySelector("iframe").style.width = `${width}px`);
window.closeApp = async () => {
  await bridge.teardownResource({});
  await bridge.close();
};

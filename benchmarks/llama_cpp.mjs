// Log-probabilities of options after prompts, by llama.cpp: node llama_cpp.mjs MODULES MODEL ADAPTER|none ROWS.json
import {readFileSync} from "node:fs";
import {resolve} from "node:path";
import {pathToFileURL} from "node:url";

const [, , modules, modelPath, adapter, rowsFile] = process.argv;
const entry = resolve(modules, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama} = await import(pathToFileURL(entry).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const lora = adapter === "none" ? undefined : {adapters: [{filePath: adapter, scale: 1}]};
const context = await model.createContext({contextSize: 256, threads: 1, lora});
const sequence = context.getSequence();
const found = [];
for (const {prompt, options} of JSON.parse(readFileSync(rowsFile, "utf8"))) {
    await sequence.clearHistory();
    const last = prompt.length - 1;
    const input = prompt.map((token, i) => (i === last ? [token, {generateNext: {probabilities: true}}] : token));
    const {probabilities} = (await sequence.controlledEvaluate(input))[last].next;
    found.push(options.map((token) => Math.log(probabilities.get(token))));
}
process.stdout.write(JSON.stringify(found), () => process.exit(0));

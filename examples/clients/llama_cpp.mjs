// Ask an exported adapter in llama.cpp: node llama_cpp.mjs BASE.gguf ADAPTER.gguf rows.csv
import {readFileSync} from "node:fs";
import {parse} from "csv-parse/sync";
import {getLlama} from "node-llama-cpp";

const [baseFile, adapterFile, rowsFile] = process.argv.slice(2);
const options = ["games", "science", "sound"];
const rows = parse(readFileSync(rowsFile, "utf8"), {columns: true});

const llama = await getLlama({gpu: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: baseFile});
const context = await model.createContext({contextSize: 512, lora: {adapters: [{filePath: adapterFile}]}});
const sequence = context.getSequence();
const words = options.map((option) => model.tokenize(` ${option}`)[0]); // each is one token

let right = 0, loss = 0;
for (const row of rows) {
    await sequence.clearHistory();
    const prompt = model.tokenize(`\n${row.description}. This is software for`);
    const input = prompt.slice(0, -1);
    input.push([prompt.at(-1), {generateNext: {probabilities: true}}]);
    const output = await sequence.controlledEvaluate(input);
    const probabilities = output.at(-1).next.probabilities;
    const scores = words.map((word) => probabilities.get(word) ?? 0);
    const total = scores.reduce((sum, score) => sum + score, 0);
    const label = options.indexOf(row.section);
    right += scores.indexOf(Math.max(...scores)) === label;
    loss -= Math.log(scores[label] / total);
}
console.log(`llama.cpp: ${right} of ${rows.length} right, loss ${(loss / rows.length).toFixed(4)}`);
process.exit(0);

// Edits a picture with openapi-fetch and the types that openapi-typescript has generated.
//
// node generated_typescript.ts URL KEY PHOTO; prints what came back as JSON. The file is checked by
// the TypeScript compiler first: a field that the description lacks does not compile.

import { readFileSync, writeFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { paths } from "./schema.d.ts";

const [url, key, photo] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${key}` } });

function form(fields: Record<string, string>): FormData {
  const data = new FormData();
  data.append("file", new Blob([readFileSync(photo!)]), "photo.png");
  for (const [name, value] of Object.entries(fields)) data.append(name, value);
  return data;
}

const edited = await client.POST("/api/edit", {
  body: { file: "", prompt: "x", seed: 7 },
  bodySerializer: (body) => form({ prompt: body.prompt, seed: String(body.seed) }),
  parseAs: "arrayBuffer",
});
if (edited.data === undefined) throw new Error(edited.error.detail);
writeFileSync("edited.png", Buffer.from(edited.data));

const whole = await client.POST("/api/edit", {
  body: { file: "", prompt: "x", num_steps: 10 },
  bodySerializer: (body) => form({ prompt: body.prompt }),
  headers: { Accept: "application/json" },
});
const answer = whole.data;
if (answer === undefined || typeof answer === "string") throw new Error("no answer in JSON");

const refused = await client.POST("/api/edit", {
  body: { file: "", prompt: "x", num_steps: 5 },
  bodySerializer: (body) => form({ prompt: body.prompt, num_steps: String(body.num_steps) }),
});

console.log(
  JSON.stringify({
    kind: edited.response.headers.get("content-type"),
    seed: edited.response.headers.get("x-seed"),
    model: answer.metadata.model,
    refused: refused.error?.errors?.map((error) => error.field),
  }),
);

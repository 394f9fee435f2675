// Asks artifacts of the layout `transformers-js` with @huggingface/transformers, offline: the trained model about pictures, in f32 and with
// quantized weights, and tiny random models what the reference implementations give.
//
// Usage: node transformers_js.mjs MODULES DIRECTORY-OF-ARTIFACTS
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, directory] = process.argv.slice(2);
const library = path.join(modules, '@huggingface/transformers/dist/transformers.node.mjs');
const { env, AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage,
  SiglipTextModel, SiglipVisionModel, Tensor } = await import(pathToFileURL(library).href);
env.allowRemoteModels = false;
env.localModelPath = directory + '/';
env.useFSCache = false;

const fixtures = path.join(import.meta.dirname, '../../fixtures');

/** Tensors of a fixture's goldens whose names begin with `prefix`, by the rest of their names. */
function golden(fixture, prefix = '') {
  const bytes = fs.readFileSync(path.join(fixtures, fixture, 'golden.safetensors'));
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + length).toString());
  const types = { F32: ['float32', Float32Array], I64: ['int64', BigInt64Array] };
  const out = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (!name.startsWith(prefix) || !(dtype in types)) continue;
    const [type, array] = types[dtype];
    const data = bytes.buffer.slice(bytes.byteOffset + 8 + length + from, bytes.byteOffset + 8 + length + to);
    out[name.slice(prefix.length)] = new Tensor(type, new array(data), shape);
  }
  return out;
}

function assertClose(got, want, what) {
  assert.deepEqual(got.dims, want.dims, what);
  const size = want.data.reduce((most, v) => Math.max(most, Math.abs(v)), 1);
  const error = want.data.reduce((most, v, i) => Math.max(most, Math.abs(v - got.data[i])), 0);
  assert.ok(error <= 1e-4 * size, `${what}: differs by ${error} of ${size}`);
}

const only = (tensors, ...names) => Object.fromEntries(names.filter((n) => n in tensors).map((n) => [n, tensors[n]]));

async function trained(name) {
  const processor = await AutoProcessor.from_pretrained(name);
  const model = await AutoModelForImageTextToText.from_pretrained(name);
  const shapes = path.join(fixtures, 'shapes-vl');
  const rows = fs.readFileSync(path.join(shapes, 'heldout.jsonl'), 'utf8').trim().split('\n').map((line) => JSON.parse(line));
  let right = 0;
  const asked = rows.slice(0, 40);
  for (const row of asked) {
    const messages = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: row.question }] }];
    const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
    const inputs = await processor(prompt, await RawImage.read(path.join(shapes, row.image)));
    const out = await model.generate({ ...inputs, max_new_tokens: 32 });
    const [text] = processor.batch_decode(out.slice(null, [inputs.input_ids.dims.at(-1), null]), { skip_special_tokens: true });
    right += text === row.answer;
  }
  assert.ok(right * 100 >= asked.length * 95, `${name}: only ${right} of ${asked.length} answers are right`);
}

async function generates(fixture, cases) {
  const model = await AutoModelForImageTextToText.from_pretrained(fixture);
  for (const name of cases) {
    const t = golden(fixture, `${name}/`);
    const want = t.generated_ids.tolist()[0].map(Number);
    const inputs = only(t, 'input_ids', 'attention_mask', 'pixel_values', 'image_grid_thw');
    const out = await model.generate({ ...inputs, max_new_tokens: want.length, do_sample: false, repetition_penalty: 1.0 });
    const got = out.tolist()[0].map(Number).slice(t.input_ids.dims[1]);
    // The golden goes on after the end of text.
    assert.ok(got.length > 0);
    assert.deepEqual(got, want.slice(0, got.length), `${fixture}: ${name}`);
  }
}

async function pairs(fixture, Text, Vision, outputs) {
  const t = golden(fixture);
  const [texts, pictures] = [only(t, 'input_ids', 'attention_mask'), only(t, 'pixel_values')];
  const scores = await (await AutoModel.from_pretrained(fixture))({ ...texts, ...pictures });
  for (const name of ['logits_per_image', 'logits_per_text', 'text_embeds', 'image_embeds']) assertClose(scores[name], t[name], `${fixture}: ${name}`);
  const text = await (await Text.from_pretrained(fixture))(texts);
  const image = await (await Vision.from_pretrained(fixture))(pictures);
  for (const [given, [name, reference]] of [[text, outputs.text], [image, outputs.image]]) assertClose(given[name], t[reference], `${fixture}: ${reference}`);
}

await trained('shapes-vl');
await trained('shapes-vl-int4');
// Without pictures, this version of the client counts the positions of Qwen's answers from twice the prompt's length on.
await generates('qwen2-vl', ['chat']);
await generates('qwen2.5-vl', ['chat']);
await generates('llava-1.5', ['chat', 'two', 'text']);
await generates('llava-llama3-gqa', ['chat', 'text']);
await pairs('clip', CLIPTextModelWithProjection, CLIPVisionModelWithProjection, { text: ['text_embeds', 'text_embeds'], image: ['image_embeds', 'image_embeds'] });
await pairs('siglip', SiglipTextModel, SiglipVisionModel, { text: ['pooler_output', 'text_pooler_output'], image: ['pooler_output', 'vision_pooler_output'] });
const vit = golden('vit');
const { logits } = await (await AutoModelForImageClassification.from_pretrained('vit'))(only(vit, 'pixel_values'));
assertClose(logits, vit.logits, 'vit: logits');
console.log('transformers.js: ok');

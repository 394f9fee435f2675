"""Asks artifacts of the layout `genai` with onnxruntime-genai: the trained model about one picture, two pictures and none; tiny random
models what the reference implementation generates.

Usage: genai.py VLMC DIRECTORY-OF-ARTIFACTS PLAIN-ARTIFACT-OF-shapes-vl REQUESTS.npz

Writes the tensors of its first questions and their answers to REQUESTS.npz, for clients that do not prepare pictures.
"""
import json
import os
import subprocess
import sys

import numpy as np
import onnxruntime_genai as og

from shared import golden, held_out, picture

binary, directory, plain, requests = sys.argv[1:]
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def generate(model, inputs, length, limit):
    """The most probable tokens, at most `limit` after a prompt of `length`."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length + limit, do_sample=False, repetition_penalty=1.0)
    generator = og.Generator(model, params)
    generator.set_inputs(inputs)
    out = []
    while not generator.is_done():
        generator.generate_next_token()
        out.append(int(generator.get_next_tokens()[0]))
    return out


def trained():
    model = og.Model(os.path.join(directory, "shapes-vl"))
    processor, tokenizer = model.create_multimodal_processor(), og.Tokenizer(model)

    def ask(question, pictures):
        message = [{"role": "user", "content": PICTURE * len(pictures) + question}]
        prompt = tokenizer.apply_chat_template(json.dumps(message), add_generation_prompt=True)
        inputs = processor(prompt, images=og.Images.open(*pictures) if pictures else None)
        length = inputs["input_ids"].as_numpy().shape[1]
        return tokenizer.decode(generate(model, inputs, length, 32)), inputs

    rows, saved = held_out(60), {}
    for i, row in enumerate(rows):
        text, inputs = ask(row["question"], [picture(row)])
        assert text == row["answer"], f"{row['image']}: {row['question']} {text!r} instead of {row['answer']!r}"
        if i < 8:
            saved[f"{i}/input_ids"] = inputs["input_ids"].as_numpy()[0].astype(np.int64)
            saved[f"{i}/pixel_values"] = inputs["pixel_values"].as_numpy()
            saved[f"{i}/image_grid_thw"] = inputs["image_grid_thw"].as_numpy()
            saved[f"{i}/answer"] = np.array(row["reference_ids"])
    np.savez(requests, count=8, **saved)
    # Two pictures, and none.
    for pictures in [[picture(rows[0]), picture(rows[1])], []]:
        text, _ = ask("How many shapes are there?", pictures)
        want = vlmc("How many shapes are there?", pictures)
        assert text == want, f"{len(pictures)} pictures: {text!r}, vlmc says {want!r}"


def vlmc(prompt, pictures):
    """What vlmc's own engine answers."""
    images = [part for path in pictures for part in ["--image", path]]
    command = [binary, "run", plain, *images, "--prompt", prompt, "--temperature", "0"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def random(fixture, case):
    """Tokens for the tensors of a golden, as a caller that prepares pictures and prompts itself gives them."""
    t = golden(fixture, case)
    placeholders = json.load(open(os.path.join(directory, fixture, "genai_config.json"), encoding="utf-8"))["model"]["image_token_id"]
    features = int((t["input_ids"] == placeholders).sum())
    # The names of the layout, and pictures of all rows of a batch in one axis.
    tensors = {"pixel_values" if name == "images" else name: value for name, value in t.items()}
    inputs = og.NamedTensors()
    inputs["input_ids"] = t["input_ids"].astype(np.int32)
    if features:
        inputs["num_image_tokens"] = np.array([features])
        inputs["feature_positions"] = np.arange(features)
        for name in ["pixel_values", "high_res_pixel_values", "image_grid_thw", "images_spatial_crop"]:
            if name in tensors:
                value = tensors[name]
                inputs[name] = value[0] if fixture == "deepseek-vl" else value
    want = t["generated_ids"][0].tolist()
    got = generate(og.Model(os.path.join(directory, fixture)), inputs, t["input_ids"].shape[1], len(want))
    # The golden goes on after the end of text.
    assert got and got == want[:len(got)], f"{fixture}: {case}: {got} instead of {want}"


trained()
for fixture in ["qwen2-vl", "qwen2.5-vl"]:
    for case in ["chat", "two", "text"]:
        random(fixture, case)
for fixture in ["llava-1.5", "llava-llama3-gqa", "deepseek-vl"]:
    for case in ["chat", "two", "text"]:
        random(fixture, case)
for fixture in ["deepseek-vl-hf", "deepseek-vl-hybrid-hf", "deepseek-vl2-mha", "deepseek-vl2-mla"]:
    random(fixture, "chat")
random("deepseek-vl2-mha", "text")
random("qwen-vl", "text")
print("genai: ok")

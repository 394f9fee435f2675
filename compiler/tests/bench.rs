//! `vlmc bench`: what it says of tiny models, and what it refuses.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Output},
};
use tempfile::TempDir;

fn vlmc(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vlmc")).args(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = vlmc(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn failure(args: &[&str]) -> String {
    let out = vlmc(args);
    assert!(!out.status.success(), "{args:?}");
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(message.contains("error:") && !message.contains("panicked"), "{message}");
    message
}

/// A fixture, compiled.
fn artifact(dir: &TempDir, fixture: &str, quant: &str) -> String {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(fixture);
    let to = dir.path().join(fixture).to_str().unwrap().to_string();
    assert!(vlmc(&["compile", from.to_str().unwrap(), "--quant", quant, "-o", &to]).status.success());
    to
}

/// Median, least and most, in order and above 0.
fn stats(v: &Value) -> f64 {
    let [median, min, max] = ["median", "min", "max"].map(|k| v[k].as_f64().unwrap_or_else(|| panic!("{v} has no {k}")));
    assert!(0.0 < min && min <= median && median <= max && max.is_finite(), "{v}");
    median
}

fn keys(v: &Value) -> Vec<&str> {
    v.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_model_that_answers_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = artifact(&dir, "qwen2-vl", "int4");
    let sizes = ["--picture", "56x84", "--picture", "112x112", "--prompt-tokens", "24", "--prompt-tokens", "7"];
    let decode = ["--new-tokens", "5", "--context", "9", "--repeat", "2", "--threads", "2", "--json"];
    let r = json(&[&["bench", &artifact], &sizes[..], &decode[..]].concat());
    let expected = "architecture target task repeat machine load_s first_token_s encode prefill decode peak_memory_bytes weight_bytes \
                    large_page_bytes";
    assert_eq!(keys(&r).join(" "), expected);
    assert_eq!((r["architecture"].as_str(), r["target"].as_str(), r["task"].as_str()), (Some("qwen2_vl"), Some("cpu"), Some("generate")));

    let m = &r["machine"];
    assert_eq!(keys(m).join(" "), "cpu threads isa buffer_bytes bandwidth_gb_s pages_4k_gb_s pages_2m_gb_s peak_gop_s");
    assert_eq!(m["threads"], 2);
    assert!(stats(&m["bandwidth_gb_s"]) >= stats(&m["pages_4k_gb_s"]) && m["isa"].is_string());
    ["int8", "f32"].iter().for_each(|kind| assert!(stats(&m["peak_gop_s"][kind]) > 0.01));

    assert!(stats(&r["load_s"]) < stats(&r["first_token_s"]));
    let encode = r["encode"].as_array().unwrap();
    assert_eq!(encode.iter().map(|e| e["picture"].as_str().unwrap()).collect::<Vec<_>>(), ["56x84", "112x112"]);
    for e in encode {
        assert_eq!(keys(e).join(" "), "picture tokens seconds gop gop_s fraction_of_peak");
        ["seconds", "gop_s", "fraction_of_peak"].iter().for_each(|k| assert!(stats(&e[k]) > 0.0));
    }
    let tokens = |e: &Value| e["tokens"].as_u64().unwrap();
    assert!(tokens(&encode[0]) < tokens(&encode[1]) && encode[0]["gop"].as_f64() < encode[1]["gop"].as_f64());

    let prefill = r["prefill"].as_array().unwrap();
    assert_eq!(prefill.iter().map(tokens).collect::<Vec<_>>(), [24, 7]);
    for p in prefill {
        assert_eq!(keys(p).join(" "), "tokens seconds tokens_per_s gop gop_s fraction_of_peak");
        ["seconds", "tokens_per_s", "gop_s", "fraction_of_peak"].iter().for_each(|k| assert!(stats(&p[k]) > 0.0));
    }

    let d = &r["decode"];
    let expected = "new_tokens context tokens_per_s bytes_per_token weight_bytes_per_token kv_bytes_per_token gb_s fraction_of_bandwidth bound_tokens_per_s gop gop_s fraction_of_peak";
    assert_eq!(keys(d).join(" "), expected);
    assert_eq!((d["new_tokens"].as_u64(), d["context"].as_u64()), (Some(5), Some(9)));
    for k in ["tokens_per_s", "gb_s", "fraction_of_bandwidth", "bound_tokens_per_s", "gop_s", "fraction_of_peak"] {
        assert!(stats(&d[k]) > 0.0, "{k}");
    }
    let number = |k: &str| d[k].as_u64().unwrap();
    assert_eq!(number("bytes_per_token"), number("weight_bytes_per_token") + number("kv_bytes_per_token"));
    assert!(number("weight_bytes_per_token") < r["weight_bytes"].as_u64().unwrap(), "the tower is not read");
    // Keys and values of a token, of 2 layers with 2 heads of 16 numbers of 4 bytes: of the 9 tokens before, 2 in the middle of the
    // new ones, and the token itself.
    let config: Value =
        serde_json::from_slice(&std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/qwen2-vl/config.json")).unwrap())
            .unwrap();
    let c = |k: &str| config[k].as_u64().unwrap();
    let row = 2 * c("num_hidden_layers") * c("num_key_value_heads") * c("hidden_size") / c("num_attention_heads") * 4;
    assert_eq!(number("kv_bytes_per_token"), (9 + 2 + 1) * row);
    if cfg!(target_os = "linux") {
        assert!(r["peak_memory_bytes"].as_u64().unwrap() > 1 << 20 && m["cpu"].is_string());
    }
}

#[test]
fn models_without_prompts_run_whole() {
    let dir = tempfile::tempdir().unwrap();
    for fixture in ["vit", "clip"] {
        let artifact = artifact(&dir, fixture, "none");
        let r = json(&["bench", &artifact, "--picture", "40x30", "--repeat", "1", "--threads", "1", "--json"]);
        assert!(stats(&r["encode"][0]["seconds"]) > 0.0 && r["encode"][0]["gop"].as_f64().unwrap() > 0.0, "{fixture}: {r:#}");
        assert!(r["prefill"].as_array().unwrap().is_empty() && r["decode"].is_null() && r["first_token_s"].is_null());
        let message = failure(&["bench", &artifact, "--context", "3"]);
        assert!(message.contains("it has no prompts"), "{message}");
        let text = vlmc(&["bench", &artifact, "--repeat", "1", "--threads", "1", "--profile"]);
        for part in ["answers no prompts: a picture is a whole run", "picture 448x448", "m x n x k", "linear "] {
            assert!(String::from_utf8_lossy(&text.stdout).contains(part), "{text:?}");
        }
    }
}

#[test]
fn a_profile_and_a_trace_have_every_step() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = artifact(&dir, "qwen2-vl", "int8");
    let file = dir.path().join("trace.json").to_str().unwrap().to_string();
    let sizes = ["--picture", "56x56", "--prompt-tokens", "12", "--new-tokens", "3", "--context", "4", "--repeat", "1"];
    let r = json(&[&["bench", &artifact], &sizes[..], &["--profile", "--trace", &file, "--json"]].concat());

    let tables = r["profile"].as_array().unwrap();
    assert_eq!(
        tables.iter().map(|t| t["phase"].as_str().unwrap()).collect::<Vec<_>>(),
        ["picture 56x56", "prompt of 12", "3 tokens after 4"]
    );
    let mut calls = 0;
    for table in tables {
        let steps = table["steps"].as_array().unwrap();
        for s in steps {
            assert_eq!(keys(s).join(" "), "op m n k weight_type calls ms share gb_s gop_s");
        }
        let sum = |k: &str| steps.iter().map(|s| s[k].as_f64().unwrap()).sum::<f64>();
        assert!(sum("ms") <= table["ms"].as_f64().unwrap() && (sum("share") - 1.0).abs() < 1e-6, "{table:#}");
        calls += sum("calls") as u64;
        let linear = steps.iter().find(|s| s["op"] == "linear" && s["weight_type"] == "int8").unwrap();
        assert!(["m", "n", "k", "gb_s", "gop_s"].iter().all(|k| linear[k].as_f64().unwrap() > 0.0), "{linear:#}");
    }
    let rows = |op: &str| tables[2]["steps"].as_array().unwrap().iter().filter(|s| s["op"] == op).count();
    assert_eq!(rows("rotary_attention"), 1, "tokens that see more and more keys are one row");

    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let events: Vec<&Value> = trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect();
    let span = |e: &Value| (e["ts"].as_f64().unwrap(), e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap());
    let (mut run, mut run_name, mut at, mut steps) = ((0.0, 0.0), "", 0.0, 0);
    // Nanoseconds are lost in microseconds.
    let slack = 1e-2;
    for e in &events {
        assert!(e["name"].is_string() && e["cat"].is_string() && e["pid"] == 1 && e["tid"] == 1, "{e}");
        let (from, to) = span(e);
        assert!(from <= to, "{e}");
        if ["vision", "embed", "decoder"].contains(&e["name"].as_str().unwrap()) {
            assert!(from >= run.1 - slack && e["args"].is_object(), "runs follow each other: {e}");
            (run, run_name, at) = ((from, to), e["name"].as_str().unwrap(), from);
            continue;
        }
        assert!(from >= at - slack && to <= run.1 + slack && e["cat"] == run_name, "steps follow each other within a run: {e}");
        assert!(["m", "n", "k", "bytes", "operations"].iter().all(|k| e["args"][k].is_u64()), "{e}");
        (at, steps) = (to, steps + 1);
    }
    assert_eq!(steps, calls, "the trace and the tables have the same steps");
    let named = |text: &str| events.iter().any(|e| e["name"].as_str().unwrap().contains(text));
    assert!(named("linear ") && named("mlp.down_proj.weight"), "steps are named by their weights");
}

#[test]
fn bad_requests_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = artifact(&dir, "qwen2-vl", "none");
    for (args, why) in [
        (&["--picture", "12"][..], "a size is a width and a height"),
        (&["--picture", "0x10"], "no pixels"),
        (&["--picture", "10000x10"], "too narrow"),
        (&["--picture", "100000x100000"], "too many pixels"),
        (&["--prompt-tokens", "0"], "--prompt-tokens"),
        (&["--prompt-tokens", "1000000000000"], "more than the model's context"),
        (&["--context", "1000000000000"], "more than the model's context"),
        (&["--new-tokens", "1000000000000"], "more than the model's context"),
        (&["--repeat", "0"], "--repeat"),
    ] {
        let message = failure(&[&["bench", &artifact], args].concat());
        assert!(message.contains(why), "{args:?}: {message}");
    }
    let empty = dir.path().to_str().unwrap();
    assert!(failure(&["bench", empty]).contains("is not an artifact"));
    let program = Path::new(&artifact).join("program.json");
    std::fs::write(&program, vec![b' '; std::fs::metadata(&program).unwrap().len() as usize]).unwrap();
    assert!(failure(&["bench", &artifact]).contains("program.json"));
}

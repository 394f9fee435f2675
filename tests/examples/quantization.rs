//! The table of docs/quantization.md: `cargo run --release -p vlmc-tests --example quantization -- --update`, which needs ONNX
//! Runtime. Without `--update` it only prints the table. Other arguments choose targets.
#![allow(clippy::print_stdout, reason = "a tool that prints")]

use std::{fmt::Write, fs, path::Path};
use vlmc_tests::quantization::{Bench, Way};

/// Around the table in the page.
const MARKS: [&str; 2] = ["<!-- table: begin -->\n", "<!-- table: end -->\n"];

const SMOOTH: &str = "base = \"int8\"\n[[rule]]\nweights = \"visual.blocks.*\"\nscheme = \"int8\"\nmethod = \"smooth\"\n";
const ALL_G32: &str = "base = \"int4\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\n";
/// Of the layers alone: the head in 8 bits.
const G32: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\n";
const ROUND: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\nmethod = \"round\"\n";
const G64: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g64\"\n";
const G128: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g128\"\n";
const AWQ: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\nmethod = \"awq\"\n";
const THREE: &str = "base = \"int4\"\n[[rule]]\nweights = \"model.layers.*.{gate,up}_proj.weight\"\nscheme = \"int3g128\"\n";
const ZEROS: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32z\"\n";

const ROWS: [(&str, Way); 19] = [
    ("none", Way::Policy("none")),
    ("int8", Way::Policy("int8")),
    ("int8, tower smoothed (SmoothQuant)", Way::Calibrated(SMOOTH)),
    ("int4: layers in groups of 128, head of 32", Way::Policy("int4")),
    ("the same, calibrated (GPTQ)", Way::Calibrated("int4")),
    ("layers and head in groups of 32", Way::Policy(ALL_G32)),
    ("the same, calibrated", Way::Calibrated(ALL_G32)),
    ("layers in 4 bits, groups of 32, round to nearest", Way::Policy(ROUND)),
    ("layers in Q4_0 of llama.cpp", Way::Q4_0),
    ("layers in 4 bits, groups of 32, searched scales", Way::Policy(G32)),
    ("the same, calibrated (GPTQ)", Way::Calibrated(G32)),
    ("the same, calibrated by AWQ", Way::Calibrated(AWQ)),
    ("layers in 4 bits, groups of 32 with zero points", Way::Policy(ZEROS)),
    ("the same, calibrated", Way::Calibrated(ZEROS)),
    ("layers in 4 bits, groups of 64", Way::Policy(G64)),
    ("the same, calibrated", Way::Calibrated(G64)),
    ("layers in 4 bits, groups of 128", Way::Policy(G128)),
    ("the same, calibrated", Way::Calibrated(G128)),
    ("auto, 4.5 bits per weight, calibrated", Way::Budget(4.5)),
];

/// Where 3 bits are read.
const CPU_ROWS: [(&str, Way); 3] = [
    ("int4, and gate and up in 3 bits", Way::Policy(THREE)),
    ("the same, calibrated", Way::Calibrated(THREE)),
    ("auto, 3.8 bits per weight, calibrated", Way::Budget(3.8)),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut targets: Vec<&str> = args.iter().map(String::as_str).filter(|a| *a != "--update").collect();
    if targets.is_empty() {
        targets = vec!["cpu", "onnx-cpu"];
    }
    let mut table = String::new();
    for target in targets {
        let bench = Bench::new(target, None);
        let _ = write!(table, "\n`{target}`:\n\n| weights | bits per weight | MB | right of 300 | as without | mean KL | largest KL |\n");
        table += "|---|---|---|---|---|---|---|\n";
        let more = if target == "cpu" { &CPU_ROWS[..] } else { &[] };
        for (name, way) in ROWS.iter().chain(more) {
            let o = bench.run(*way);
            let bits = o.bits_per_weight.map_or("-".into(), |b| format!("{b:.2}"));
            let megabytes = o.weight_bytes as f64 / 1e6;
            let s = o.score;
            let row = format!("| {name} | {bits} | {megabytes:.2} | {} | {} | {:.1e} | {:.1e} |\n", s.right, s.same, s.mean_kl, s.max_kl);
            print!("{row}");
            table += &row;
        }
    }
    if args.iter().any(|a| a == "--update") {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/quantization.md");
        let text = fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
        let (before, rest) = text.split_once(MARKS[0]).expect("the page marks where the table begins");
        let (_, after) = rest.split_once(MARKS[1]).expect("the page marks where the table ends");
        let text = format!("{before}{}{}\n{}{after}", MARKS[0], table, MARKS[1]);
        fs::write(&page, text).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
    }
}

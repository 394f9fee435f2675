//! One file per case in `filetests/`: a header that names the passes and the target, and a program. The snapshot is what the
//! passes did, where their rules fired, why they refused, and the program that came out; each is held to its contract as well.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

mod common;

use vlmc_ir::{text::parse, verify};
use vlmc_passes::{Pass, Target, check};

/// The value of `; name: value` in a header.
fn header<'t>(text: &'t str, name: &str) -> &'t str {
    let line = text.lines().take_while(|l| l.starts_with(';')).find_map(|l| l[1..].trim().strip_prefix(name)?.strip_prefix(": "));
    line.unwrap_or_else(|| panic!("the header has no '{name}'"))
}

fn passes(target: &Target, names: &str) -> Vec<Pass> {
    if names == "all" {
        return target.passes.to_vec();
    }
    let pass =
        |name: &str| *target.passes.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("{} has no pass '{name}'", target.name));
    names.split(", ").map(pass).collect()
}

#[test]
fn filetests() {
    insta::glob!("filetests/*.ir", |path| {
        let text = std::fs::read_to_string(path).unwrap();
        let target = vlmc::target::named(header(&text, "target")).unwrap();
        let passes = passes(target, header(&text, "pass"));
        let program = parse(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let program = verify(program).unwrap_or_else(|found| panic!("{}: {}", path.display(), found[0]));
        let weights = common::drawn_weights(&program);
        check(target, program.clone(), &passes, 1, &weights).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut out = String::new();
        let program = vlmc_passes::run(target, program, &passes, |trace, _| out += &trace.to_string()).unwrap();
        insta::assert_snapshot!(format!("{out}\n{}", *program));
    });
}

/// Every pass of every target has a file of its own.
#[test]
fn every_pass_has_a_filetest() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests");
    let texts: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "ir"))
        .map(|p| std::fs::read_to_string(p).unwrap())
        .collect();
    for target in vlmc::target::TARGETS {
        for pass in target.passes {
            assert!(texts.iter().any(|t| header(t, "pass") == pass.name), "{} has no filetest", pass.name);
        }
    }
}

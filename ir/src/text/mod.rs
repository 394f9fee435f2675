//! The text form of programs.
//!
//! ```text
//! program qwen2_vl
//! symbol seq: 1..=32768
//! symbol image_tokens: 1..=32768
//!
//! graph vision(%pixel_values: f32[4*image_tokens, 1176]) -> (image_features: f32[4*image_tokens, 1280]) {
//!   [visual]
//!   %0 = linear(%pixel_values, @.patch_embed.proj.weight bf16[1280, 1176])     -> f32[4*image_tokens, 1280]
//!   repeat i in 0..32 (%1 = %0) {
//!     [visual.blocks.{i}]
//!     %2 = layer_norm(%1, @.norm1.weight bf16[1280], @.norm1.bias bf16[1280]) {eps=1e-6} -> f32[4*image_tokens, 1280]
//!     %3 = add(%1, %2)                                                         -> f32[4*image_tokens, 1280]
//!     yield %3
//!   } -> %4
//!   return %4
//! }
//!
//! weight visual.patch_embed.proj.weight bf16[1280, 1176] = reshape(*, [1280, 1176])
//! ```
//!
//! # Grammar
//! `x*` is any number of `x`, `x,*` the same with commas between; line ends are white space, and `;` starts a comment.
//! ```text
//! program   = "program" name symbol* graph* default? (weight | "repeat" range "{" weight* "}")*
//! symbol    = "symbol" name ":" int "..=" int
//! graph     = "graph" name "(" ("%" name ":" type),* ")" "->" "(" (name ":" type),* ")" "{"
//!               (state | "repeat" range "{" state* "}")* (heading | node | repeat)* ("return" operand,*)? "}"
//! state     = "state" name "->" name ":" type "grows" int           past, present, axis
//! heading   = "[" name? "]"                                         scope of the nodes that follow
//! node      = ("%" int),* "=" op "(" operand,* ")" ("{" (name "=" value),* "}")? "->" type,*
//! repeat    = "repeat" range ("(" ("%" int "=" operand),* ")")? "{" (heading | node)* ("yield" operand,*)? "}" ("->" ("%" int),*)?
//! range     = "i" "in" int ".." int
//! operand   = "%" int | "%" name | "@" name type | literal          result, input or state, weight
//! literal   = dtype ("[" int,* "]")? "(" number,* ")"
//! type      = dtype "[" dim,* "]"
//! value     = number | "[" value,* "]" | string | text without comma, except in parentheses
//! default   = "weights" "=" recipe
//! weight    = "weight" name type "=" recipe
//! recipe    = source | "reshape" "(" recipe "," "[" int,* "]" ")" | "cast" "(" recipe "," dtype ")" | "concat" "(" recipe,* ")"
//!           | "interleave" "(" int "," recipe,* ")" | "transpose" "(" recipe "," int ")" | "scale" "(" recipe "," source ")"
//!           | "quantize" "(" recipe "," dtype "," method ")" | "codes" "(" source "," dtype ")"
//! source    = "*" | name
//! method    = "round" | "search"
//! name      = letters, digits, "_", "." and "+", but no "." in front; or a JSON string
//! ```
//!
//! - Only results have numbers; they mean nothing beyond their graph, and those in a repeat nothing beyond it.
//! - A weight `@.attn.weight` goes on from the scope: `visual.blocks.0.attn.weight` after `[visual.blocks.0]`, and so does each
//!   part of `@.gate.weight+.up.weight`.
//! - `repeat i in 2..5 (%1 = %0) { ... yield %7, %8 } -> %9, %10`: the body is there for `i` = 2, 3 and 4, and in names
//!   `{i}`, `{i+1}`, `{i-2}` stand for numbers. `%1` is `%0` the first time and then the first yield of the time before; the
//!   yields of the last time are the results. There is no scope at the start of a body and after a repeat.
//! - The types after `->` are checked against what the op gives.
//! - A weight that is not listed at the end has the type of its first use and the recipe of `weights`, else the checkpoint
//!   tensor of its own name, which recipes write as `*`.
//!
//! # Round trip
//! For a program that verifies, `parse(&program.to_string())` gives a program that is equal but for the order of the values in
//! a graph, which comes from their first use, and values without use, which are gone: exactly what
//! `rewrite(graph, |_, _, _| None)` makes of each graph. So printing what was parsed gives the same text.

mod fold;
mod parse;
mod syntax;
mod unfold;

use crate::{Graph, Program};
use std::fmt;

/// Why a text is not a program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Character of the line, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

/// A message at a byte of the text.
struct Fail {
    at: usize,
    message: String,
}

/// The program that `text` stands for. It is as well typed as the text says, but not verified.
///
/// # Errors
/// The first thing that is wrong, and where. Repeats may stand for 16 MiB of text.
pub fn parse(text: &str) -> Result<Program, ParseError> {
    let parsed = parse::file(text).and_then(|file| unfold::program(&file));
    parsed.map_err(|Fail { at, message }| {
        let before = text.get(..at).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |n| n + 1);
        let column = before[line_start..].chars().count() + 1;
        ParseError { line: before.matches('\n').count() + 1, column, message }
    })
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fold::program(self).fmt(f)
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fold::graph(self).fmt(f)
    }
}

//! tiktoken's vocabularies (`qwen.tiktoken`: a token in base64 and its rank per line) as a `tokenizer.json`.

use crate::{Error, Result};
use serde_json::{Value, json};
use std::{collections::HashMap, path::Path};

/// File name of Qwen's ranks.
pub const QWEN: &str = "qwen.tiktoken";

/// Qwen's split of a text into words (`tokenization_qwen.py`).
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen's special tokens, from the number of ranks on.
pub fn qwen_specials() -> Vec<String> {
    let marks = ["ref", "box", "quad", "img"].iter().flat_map(|m| [format!("<{m}>"), format!("</{m}>")]);
    let first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from).into_iter();
    first.chain((0..205).map(|i| format!("<|extra_{i}|>"))).chain(marks).chain(["<imgpad>".into()]).collect()
}

/// The tokenizer of a `qwen.tiktoken`.
///
/// # Errors
/// The file is not such a list.
pub fn qwen_tokenizer(path: &Path, ranks: &str) -> Result<Value> {
    let mut tokens = vec![];
    for (i, line) in ranks.lines().filter(|l| !l.is_empty()).enumerate() {
        let (token, rank) = line.split_once(' ').ok_or_else(|| Error::file(path, format!("line {} is no token and rank", i + 1)))?;
        let bytes = base64(token).ok_or_else(|| Error::file(path, format!("line {}: '{token}' is not base64", i + 1)))?;
        if rank.trim().parse() != Ok(i) {
            return Err(Error::file(path, format!("line {} has rank {rank}, {i} was expected", i + 1)));
        }
        tokens.push(bytes);
    }
    let ids: HashMap<&[u8], usize> = tokens.iter().enumerate().map(|(i, t)| (t.as_slice(), i)).collect();
    let letters = printable_bytes();
    let text = |bytes: &[u8]| bytes.iter().map(|b| letters[usize::from(*b)]).collect::<String>();
    let mut merges = vec![];
    for (rank, token) in tokens.iter().enumerate().filter(|(_, t)| t.len() > 1) {
        // The last merge that makes it; what no merges make is never made.
        if let [a, b] = parts(token, rank, &ids)[..] {
            merges.push(json!([text(a), text(b)]));
        }
    }
    let vocab: serde_json::Map<String, Value> = tokens.iter().enumerate().map(|(i, t)| (text(t), json!(i))).collect();
    let added: Vec<Value> = qwen_specials()
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let id = tokens.len() + i;
            json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let split = json!({"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": false});
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": true, "vocab": vocab, "merges": merges}
    }))
}

/// Merges the bytes of a token as tiktoken does, lowest rank first, with ranks below `limit`.
fn parts<'t>(token: &'t [u8], limit: usize, ids: &HashMap<&[u8], usize>) -> Vec<&'t [u8]> {
    let mut cuts: Vec<usize> = (0..=token.len()).collect();
    loop {
        let rank = |w: &[usize]| ids.get(&token[w[0]..w[2]]).copied().filter(|r| *r < limit);
        let best = cuts.windows(3).enumerate().filter_map(|(i, w)| Some((rank(w)?, i))).min();
        match best {
            Some((_, i)) => cuts.remove(i + 1),
            None => break,
        };
    }
    cuts.windows(2).map(|w| &token[w[0]..w[1]]).collect()
}

/// GPT-2's printable stand-in for each byte.
fn printable_bytes() -> [char; 256] {
    let mut next = 256u32;
    std::array::from_fn(|b| {
        let b = b as u8;
        if matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            return char::from(b);
        }
        next += 1;
        char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = vec![];
    let (mut bits, mut n) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        (bits, n) = (bits << 6 | u32::from(value), n + 6);
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
            bits &= (1 << n) - 1;
        }
    }
    // What is left over is less than a byte, and zero.
    (n < 6 && bits == 0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_all_lengths() {
        for (text, bytes) in [("", &b""[..]), ("IQ==", b"!"), ("dXM=", b"us"), ("YXNz", b"ass"), ("/+8=", b"\xff\xef")] {
            assert_eq!(base64(text).as_deref(), Some(bytes), "{text}");
        }
        assert!(base64("I").is_none() && base64("I*==").is_none());
    }

    #[test]
    fn damaged_lists_are_refused() {
        for text in ["IQ==", "IQ== 1", "I*== 0", "IQ== 0\nIg== 2"] {
            assert!(qwen_tokenizer(Path::new(QWEN), text).is_err(), "{text}");
        }
    }
}

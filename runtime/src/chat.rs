//! Chat templates, rendered as transformers renders them (`apply_chat_template`): Jinja2 with `trim_blocks` and
//! `lstrip_blocks`, Python's string methods, its own `tojson`, `raise_exception` and `strftime_now`.

use crate::{Error, Result, artifact_dir::read_limited};
use minijinja::{
    Environment, ErrorKind, State, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, ValueKind},
};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};
use std::{io, path::Path};

/// Steps that a template may take: thousands of turns, and an end to one that loops.
const FUEL: u64 = 20_000_000;
/// Longest file that is read.
const MAX_FILE: u64 = 16 << 20;
/// Longest prompt that is rendered.
const MAX_PROMPT: usize = 64 << 20;

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text, pictures and videos in order.
    pub content: Vec<Content>,
}

/// A part of a [`Message`], as templates see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Content {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// A picture.
    Image,
    /// A video.
    Video,
}

/// A chat template.
pub struct ChatTemplate {
    source: String,
    /// Variables for special tokens, such as `bos_token`.
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// A template by its source.
    pub fn new(source: &str) -> Self {
        // transformers marks the assistant's tokens for training with these; they render nothing.
        let mut text = source.to_string();
        for tag in ["{% generation %}", "{%- generation %}", "{% generation -%}", "{%- generation -%}"] {
            for tag in [tag.to_string(), tag.replace("generation", "endgeneration")] {
                text = text.replace(&tag, &tag.replace("endgeneration", "set _ = 0").replace("generation", "set _ = 0"));
            }
        }
        Self { source: text, tokens: vec![] }
    }

    /// The template of a model directory: `chat_template.jinja`, `chat_template.json` or the `chat_template` of
    /// `tokenizer_config.json` (text, or a list of which the one named `default` is taken), or else `fallback`. `path` finds files by
    /// name.
    ///
    /// # Errors
    /// A file cannot be read or is not what its name says.
    pub fn open(path: impl Fn(&str) -> Option<std::path::PathBuf>, fallback: Option<&str>) -> Result<Option<Self>> {
        let json = |name: &str| {
            path(name)
                .map(|p| {
                    serde_json::from_slice::<serde_json::Value>(&read_limited(&p, MAX_FILE)?).map_err(|e| Error::file(p, e.to_string()))
                })
                .transpose()
        };
        let config = json("tokenizer_config.json")?;
        let source = match path("chat_template.jinja") {
            Some(p) => Some(text(&p)?),
            None => match json("chat_template.json")? {
                Some(file) => template(&file),
                None => config.as_ref().and_then(template),
            },
        };
        Ok(source.or_else(|| fallback.map(String::from)).map(|source| {
            let mut chat = Self::new(&source);
            for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
                let token = config.as_ref().and_then(|c| c.get(name)).and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
                chat.tokens.extend(token.map(|t| (name.to_string(), t.to_string())));
            }
            chat
        }))
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// The template is not valid, refuses the conversation, or does not come to an end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_with(&[("messages", Value::from(Serde(messages)))], add_generation_prompt)
    }

    fn render_with(&self, variables: &[(&str, Value)], add_generation_prompt: bool) -> Result<String> {
        let failed = |e: minijinja::Error| Error::Input(format!("the chat template failed: {e}"));
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        env.set_syntax(syntax);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(100);
        env.set_unknown_method_callback(python_method);
        env.add_filter("tojson", to_json);
        env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_template("chat", &self.source).map_err(failed)?;
        let mut all: Vec<(String, Value)> = self.tokens.iter().map(|(n, v)| (n.clone(), Value::from(v.as_str()))).collect();
        all.push(("add_generation_prompt".into(), add_generation_prompt.into()));
        all.extend(variables.iter().map(|(n, v)| ((*n).to_string(), v.clone())));
        let context = Value::from(all.into_iter().collect::<std::collections::BTreeMap<_, _>>());
        let prompt = env.get_template("chat").and_then(|t| t.render(context)).map_err(failed)?;
        if prompt.len() > MAX_PROMPT {
            return Err(Error::Input(format!("the prompt is longer than {MAX_PROMPT} bytes")));
        }
        Ok(prompt)
    }
}

fn text(path: &Path) -> Result<String> {
    String::from_utf8(read_limited(path, MAX_FILE)?).map_err(|_| Error::file(path, "is not UTF-8"))
}

fn template(config: &serde_json::Value) -> Option<String> {
    match config.get("chat_template")? {
        serde_json::Value::String(s) => Some(s.clone()),
        serde_json::Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").or(named.first())?;
            default["template"].as_str().map(String::from)
        }
        _ => None,
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Accepted and of no effect: what transformers' own filter does by default.
    let _: (Option<bool>, Option<bool>) = (kwargs.get("ensure_ascii")?, kwargs.get("sort_keys")?);
    kwargs.assert_all_used()?;
    let mut out = vec![];
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    match indent.map(|n| " ".repeat(n.min(16))) {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)).map_err(failed)?,
        Some(indent) => {
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// Python's separators: `", "` and `": "`.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        CompactFormatter.begin_array(w)
    }
}

/// String methods that minijinja's own Python compatibility lacks.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    let Some(s) = value.as_str().filter(|_| value.kind() == ValueKind::String) else {
        if (value.kind(), method) == (ValueKind::Map, "copy") {
            return Ok(value.clone());
        }
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args);
    };
    let arg = |i: usize| args.get(i).and_then(Value::as_str);
    let triple = |a: &str, b: &str, c: &str| Value::from_iter([a, b, c].map(Value::from));
    Ok(match (method, arg(0)) {
        ("removeprefix", Some(p)) => s.strip_prefix(p).unwrap_or(s).into(),
        ("removesuffix", Some(p)) => s.strip_suffix(p).unwrap_or(s).into(),
        ("partition", Some(p)) if !p.is_empty() => s.split_once(p).map_or_else(|| triple(s, "", ""), |(a, b)| triple(a, p, b)),
        ("rpartition", Some(p)) if !p.is_empty() => s.rsplit_once(p).map_or_else(|| triple("", "", s), |(a, b)| triple(a, p, b)),
        ("rsplit", Some(p)) if !p.is_empty() => {
            let limit = args.get(1).and_then(|n| usize::try_from(n.as_i64()?).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut parts: Vec<Value> = s.rsplitn(limit, p).map(Value::from).collect();
            parts.reverse();
            Value::from(parts)
        }
        ("index", Some(p)) => match s.find(p) {
            Some(at) => Value::from(s[..at].chars().count()),
            None => return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "substring not found")),
        },
        ("zfill" | "ljust" | "rjust" | "center", _) => {
            let width = args.first().and_then(Value::as_i64).and_then(|w| usize::try_from(w).ok()).unwrap_or(0).min(1 << 16);
            let missing = width.saturating_sub(s.chars().count());
            let fill = if method == "zfill" { "0" } else { arg(1).unwrap_or(" ") };
            let (left, right) = match method {
                "ljust" => (0, missing),
                // CPython puts the odd one on the left if the width is odd.
                "center" => (missing / 2 + (missing & width & 1), missing - missing / 2 - (missing & width & 1)),
                _ => (missing, 0),
            };
            // The sign stays in front.
            match s.strip_prefix(['-', '+']).filter(|_| method == "zfill") {
                Some(digits) => format!("{}{}{digits}", &s[..1], fill.repeat(left)).into(),
                None => format!("{}{s}{}", fill.repeat(left), fill.repeat(right)).into(),
            }
        }
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String> {
        let x = serde_json::json!({"k": ["a", 1, 2.5, null, true], "é": "<&>"});
        ChatTemplate::new(template).render_with(&[("x", Value::from(Serde(&x)))], false)
    }

    #[test]
    fn features_of_templates_give_what_python_gives() {
        // Right-hand sides: Jinja2 3.1 set up as transformers does it.
        for (template, expected) in [
            ("{{ x | tojson }}", r#"{"k": ["a", 1, 2.5, null, true], "é": "<&>"}"#),
            ("{{ x.k[:2] | tojson(indent=2) }}", "[\n  \"a\",\n  1\n]"),
            ("{{ 'a.b.c'.rsplit('.', 1) }}", "['a.b', 'c']"),
            ("{{ 'a=b=c'.partition('=')[2] }}", "b=c"),
            ("{{ 'prefix-x'.removeprefix('prefix-') }}", "x"),
            ("{{ '-7'.zfill(4) }}|{{ 'ab'.center(5) }}|{{ 'ab'.rjust(4, '.') }}", "-007|  ab |..ab"),
            ("{% for i in [1, 2, 3] %}\n{% if i == 2 %}{% continue %}{% endif %}\n{{ i }}\n{% endfor %}", "1\n3\n"),
            ("{% set ns = namespace(n=0) %}{% for i in x.k %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "5"),
            ("{% generation %}a{% endgeneration %}", "a"),
            ("{{ '  Ab '.strip().lower() }}{{ x.get('none') is none }}", "abTrue"),
        ] {
            assert_eq!(render(template).unwrap_or_else(|e| e.to_string()), expected, "{template}");
        }
    }

    #[test]
    fn bad_templates_end_with_an_error() {
        assert!(render("{{ raise_exception('only users may speak') }}").unwrap_err().to_string().contains("only users may speak"));
        assert!(render("{% if %}").is_err());
        assert!(render("{% for i in range(100000) %}{% for j in range(100000) %}{{ j }}{% endfor %}{% endfor %}").is_err());
        assert!(render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
    }
}

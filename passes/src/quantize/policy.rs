//! Which weights are quantized, and how: the built-in policies, and files of rules.

use globset::{Glob, GlobMatcher};
use serde::Deserialize;
use std::collections::BTreeMap;
use vlmc_ir::{Scheme, quant::Method};

/// What a weight is to a model. Weights of no part (norms, biases, positions, convolutions) are never quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// A linear layer of a decoder.
    Decoder,
    /// The experts of a decoder.
    Experts,
    /// The linear layer that gives a decoder's logits.
    Head,
    /// A table of tokens, of [`super::LEAST_ENTRIES`] entries or more.
    Table,
    /// A linear layer of a tower, or of the projector after it.
    Tower,
    /// The first linear layer of a tower: what it reads is the request's.
    First,
    /// The linear layer that chooses experts.
    Router,
}

/// What calibration data are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calibration {
    /// Nothing.
    Unused,
    /// If there are any, [`Self::Gptq`] for fewer than 8 bits.
    Optional,
    /// Codes that keep outputs ([`super::gptq`]).
    Gptq,
    /// Columns scaled before codes are chosen ([`super::scaling::awq`]).
    Awq,
    /// Columns scaled so that inputs are easier to round ([`super::scaling::smooth`]).
    Smooth,
}

/// How a weight is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How its elements are kept.
    pub scheme: Scheme,
    /// How scales are chosen.
    pub method: Method,
    /// What calibration data are for.
    pub calibration: Calibration,
    /// Whether what it multiplies is rounded to 8 bits too.
    pub dynamic: bool,
}

/// Which weights are quantized, and how.
#[derive(Clone, Debug)]
pub struct Policy {
    text: String,
    /// The first whose pattern fits a weight's name decides; `None` leaves it as it is.
    rules: Vec<(GlobMatcher, Option<Choice>)>,
    /// For weights that no rule names.
    base: fn(Part) -> Option<Choice>,
}

/// Why a policy cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// There is no built-in one of that name.
    #[error("unknown policy '{0}'; there are none, int8 and int4")]
    Unknown(String),
    /// The file is not one.
    #[error("{0}")]
    Invalid(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    base: Option<String>,
    #[serde(default)]
    rule: Vec<FileRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    weights: String,
    scheme: String,
    method: Option<String>,
    activations: Option<String>,
}

impl Choice {
    /// Scales chosen by search, or what calibration makes of it.
    pub fn new(scheme: Scheme, dynamic: bool) -> Self {
        Self { scheme, method: Method::Search, calibration: Calibration::Optional, dynamic }
    }
}

/// Names of the built-in policies, each with what it does.
pub const BUILT_IN: [(&str, &str); 3] = [
    ("none", "weights as in the checkpoint"),
    ("int8", "8 bits with a scale per row, and activations rounded to 8 bits"),
    ("int4", "a decoder in 4 bits with a scale per 128 columns, head and table of tokens per 32; towers as int8"),
];

impl Policy {
    /// A built-in policy.
    ///
    /// # Errors
    /// [`PolicyError::Unknown`].
    pub fn named(name: &str) -> Result<Self, PolicyError> {
        let base: fn(Part) -> Option<Choice> = match name {
            "none" => return Ok(Self::none()),
            "int8" => |part| match part {
                Part::First | Part::Router => None,
                _ => Some(Choice::new(Scheme::INT8, true)),
            },
            "int4" => |part| match part {
                Part::First | Part::Router => None,
                Part::Tower => Some(Choice::new(Scheme::INT8, true)),
                Part::Decoder | Part::Experts => Some(Choice::new(Scheme::INT4G128, true)),
                Part::Head | Part::Table => Some(Choice::new(Scheme::INT4, true)),
            },
            other => return Err(PolicyError::Unknown(other.into())),
        };
        Ok(Self { text: name.into(), rules: vec![], base })
    }

    /// The policy that leaves all weights as they are.
    pub fn none() -> Self {
        Self { text: "none".into(), rules: vec![], base: |_| None }
    }

    /// The name of a built-in policy, or the text of the file: policies of equal texts are equal.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// A policy from a TOML file: `base`, a built-in policy for the weights that no rule names (none if absent), and rules in
    /// order, the first that fits counts. `weights` is a pattern of names in which `*` stands for anything; `scheme` as
    /// [`Scheme`] prints, or `none`; `method` is `search` or `round`, which need no data, or `gptq`, `awq` or `smooth`, which do;
    /// `activations` `int8` or `f32`.
    ///
    /// ```toml
    /// base = "int4"
    /// [[rule]]
    /// weights = "model.layers.0.*"
    /// scheme = "int8"
    /// ```
    ///
    /// # Errors
    /// [`PolicyError::Invalid`] says what and where.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let invalid = |why: String| PolicyError::Invalid(why);
        let file: File = toml::from_str(text).map_err(|e| invalid(e.to_string().trim_end().into()))?;
        let mut policy = Self { text: text.into(), ..Self::named(file.base.as_deref().unwrap_or("none"))? };
        for (i, rule) in file.rule.iter().enumerate() {
            let at = |field: &str, why: String| invalid(format!("rule {}: `{field}`: {why}", i + 1));
            let pattern = Glob::new(&rule.weights).map_err(|e| at("weights", e.to_string()))?.compile_matcher();
            let dynamic = match rule.activations.as_deref() {
                None | Some("int8") => true,
                Some("f32") => false,
                Some(other) => return Err(at("activations", format!("must be int8 or f32, is '{other}'"))),
            };
            let (method, calibration) = match rule.method.as_deref() {
                None => (Method::Search, Calibration::Optional),
                Some("gptq") => (Method::Search, Calibration::Gptq),
                Some("awq") => (Method::Search, Calibration::Awq),
                Some("smooth") => (Method::Search, Calibration::Smooth),
                Some(name) => {
                    let unknown = |_: String| at("method", format!("must be search, round, gptq, awq or smooth, is '{name}'"));
                    (name.parse().map_err(unknown)?, Calibration::Unused)
                }
            };
            let choice = match rule.scheme.as_str() {
                "none" => None,
                scheme => Some(Choice { scheme: scheme.parse().map_err(|why| at("scheme", why))?, method, calibration, dynamic }),
            };
            policy.rules.push((pattern, choice));
        }
        Ok(policy)
    }

    /// The policy that names weights and their schemes one by one; others are as in `int8`.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn listing(schemes: &BTreeMap<String, Scheme>) -> Result<Self, PolicyError> {
        let mut text = String::from("base = \"int8\"\n");
        for (name, scheme) in schemes {
            let pattern = toml::Value::String(globset::escape(name));
            text += &format!("[[rule]]\nweights = {pattern}\nscheme = \"{scheme}\"\n");
        }
        Self::parse(&text)
    }

    /// How a weight of that name and part is quantized.
    pub fn choice(&self, name: &str, part: Part) -> Option<Choice> {
        self.rules.iter().find(|(pattern, _)| pattern.is_match(name)).map_or_else(|| (self.base)(part), |(_, choice)| *choice)
    }
}

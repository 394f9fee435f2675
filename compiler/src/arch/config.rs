//! Reading `config.json`: every getter's error names the field.

use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::{cell::RefCell, collections::BTreeSet, ops::RangeInclusive, rc::Rc, sync::LazyLock};

/// Fields that change nothing of what a model computes: metadata, training, and what follows from the weights.
const HARMLESS: &[&str] = &[
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "auto_map",
    "bos_token_id",
    "classifier_dropout",
    "dropout",
    "dtype",
    "encoder_stride",
    "eos_token_id",
    "hidden_dropout_prob",
    "ignore_index",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "max_window_layers",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "sliding_window",
    "spatial_patch_size",
    "tokenizer_class",
    "torch_dtype",
    "quantization_config",
    "transformers_version",
    "use_cache",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
];

/// An object of the config, with its path, and possibly the object around it as a fallback: the same field may stand in
/// `text_config` or, in older files, at the top.
#[derive(Clone)]
pub(super) struct Section<'a> {
    path: String,
    fields: &'a Map<String, Value>,
    outer: Option<&'a Map<String, Value>>,
    /// Paths of the fields that were asked for, of the whole config.
    read: Rc<RefCell<BTreeSet<String>>>,
}

impl<'a> Section<'a> {
    pub(super) fn root(config: &'a Value) -> Result<Self> {
        let fields = config.as_object().ok_or_else(|| Error::config("", "the file must hold an object"))?;
        Ok(Self { path: String::new(), fields, outer: None, read: Rc::default() })
    }

    /// Paths of the fields that nothing has asked for and that may matter: of this section and those in it that were opened.
    pub(super) fn unread(&self) -> Vec<String> {
        fn walk(fields: &Map<String, Value>, prefix: &str, read: &BTreeSet<String>, out: &mut Vec<String>) {
            for (name, value) in fields.iter().filter(|(n, v)| !HARMLESS.contains(&n.as_str()) && !v.is_null()) {
                let path = format!("{prefix}{name}");
                let opened = format!("{path}.");
                match value {
                    Value::Object(inner) if read.iter().any(|r| r.starts_with(&opened)) => walk(inner, &opened, read, out),
                    _ if !read.contains(&path) => out.push(path),
                    _ => {}
                }
            }
        }
        let mut out = vec![];
        walk(self.fields, "", &self.read.borrow(), &mut out);
        out
    }

    /// Fields that say again what others or the tensors say.
    pub(super) fn ignore(&self, fields: &[&str]) {
        for field in fields {
            self.value(field);
        }
    }

    /// Path of a field, for error messages.
    pub(super) fn path(&self, field: &str) -> String {
        if self.path.is_empty() || !self.fields.contains_key(field) { field.into() } else { format!("{}.{field}", self.path) }
    }

    fn value(&self, field: &str) -> Option<&'a Value> {
        let own = if self.path.is_empty() { field.to_string() } else { format!("{}.{field}", self.path) };
        // Where a field may stand in two places, both are known.
        self.read.borrow_mut().extend([own, field.to_string()].into_iter().take(if self.outer.is_some() { 2 } else { 1 }));
        self.fields.get(field).or_else(|| self.outer?.get(field)).filter(|v| !v.is_null())
    }

    /// Takes note of fields that change nothing of this model.
    pub(super) fn without_effect(&self, fields: &[&str]) {
        for field in fields {
            self.value(field);
        }
    }

    /// Whether the field is there, if only to say `null`.
    pub(super) fn mentions(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    /// The object `field`, if it is there.
    pub(super) fn section(&self, field: &str) -> Result<Option<Section<'a>>> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let fields = value.as_object().ok_or_else(|| Error::config(self.path(field), format!("must be an object, is {value}")))?;
        Ok(Some(Section { path: self.path(field), fields, outer: None, read: self.read.clone() }))
    }

    /// The object `field`; one without fields if it is not there.
    pub(super) fn section_or_empty(&self, field: &str) -> Result<Section<'a>> {
        static EMPTY: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        let empty = || Section { path: field.into(), fields: &EMPTY, outer: None, read: self.read.clone() };
        Ok(self.section(field)?.unwrap_or_else(empty))
    }

    /// The object `field`.
    pub(super) fn require_section(&self, field: &str) -> Result<Section<'a>> {
        let path = if self.path.is_empty() { field.into() } else { format!("{}.{field}", self.path) };
        self.section(field)?.ok_or_else(|| Error::config(path, "is missing"))
    }

    /// The object `field` with this one as a fallback; this one if it is not there.
    pub(super) fn section_or_self(&self, field: &str) -> Result<Section<'a>> {
        Ok(self.section(field)?.map_or_else(|| self.clone(), |s| Section { outer: Some(self.fields), ..s }))
    }

    /// The field's value, if it is there.
    pub(super) fn get<T: DeserializeOwned>(&self, field: &str) -> Result<Option<T>> {
        let Some(value) = self.value(field) else { return Ok(None) };
        serde_json::from_value(value.clone()).map(Some).map_err(|e| Error::config(self.path(field), format!("{value}: {e}")))
    }

    /// The field's value.
    pub(super) fn require<T: DeserializeOwned>(&self, field: &str) -> Result<T> {
        let path = if self.path.is_empty() { field.into() } else { format!("{}.{field}", self.path) };
        self.get(field)?.ok_or_else(|| Error::config(path, "is missing"))
    }

    /// An integer within `range`.
    pub(super) fn int(&self, field: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let value: Value = self.require(field)?;
        self.in_range(field, &value, range)
    }

    /// An integer within `range`, if it is there.
    pub(super) fn opt_int(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        self.value(field).map(|v| self.in_range(field, v, range)).transpose()
    }

    fn in_range(&self, field: &str, value: &Value, range: RangeInclusive<usize>) -> Result<usize> {
        let int = value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| range.contains(v));
        int.ok_or_else(|| {
            Error::config(self.path(field), format!("must be an integer from {} to {}, is {value}", range.start(), range.end()))
        })
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let number = value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        number.map(Some).ok_or_else(|| Error::config(self.path(field), format!("must be a positive number, is {value}")))
    }

    /// Refuses a field whose value is neither absent, null nor one of `allowed`.
    pub(super) fn only(&self, field: &str, allowed: &[Value]) -> Result<()> {
        match self.value(field) {
            Some(v) if !allowed.contains(v) => {
                let allowed: Vec<_> = allowed.iter().map(Value::to_string).collect();
                let instead = if allowed.is_empty() { String::new() } else { format!("; supported: {}", allowed.join(", ")) };
                Err(Error::config(self.path(field), format!("{v} is not supported{instead}")))
            }
            _ => Ok(()),
        }
    }
}

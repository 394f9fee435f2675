//! Element types.

use crate::Scheme;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Element type of a tensor, named as safetensors and the IR text name it (`f32`, `bf16`, `i64`, `bool`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// One byte per element, 0 or 1.
    Bool,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer: indices, positions, token ids.
    I64,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision.
    F32,
    /// Real numbers as codes with scales; weights only.
    Quant(Scheme),
}

impl DType {
    /// All plain types, in the order of their declaration.
    pub const ALL: [DType; 8] = [Self::Bool, Self::U8, Self::I8, Self::I32, Self::I64, Self::F16, Self::BF16, Self::F32];

    /// Bytes per element; of a quantized type, of a code before it is packed.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::Quant(_) => 1,
            Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 => 8,
        }
    }

    /// True for `f16`, `bf16`, `f32`, and quantized types, which stand for real numbers too.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32 | Self::Quant(_))
    }

    /// The scheme of a quantized type.
    pub fn scheme(self) -> Option<Scheme> {
        if let Self::Quant(scheme) = self { Some(scheme) } else { None }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bool => "bool",
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
            Self::Quant(scheme) => return scheme.fmt(f),
        })
    }
}

impl FromStr for DType {
    type Err = String;

    /// Accepts the lower-case name; safetensors' upper-case spelling (`BF16`) is accepted too.
    fn from_str(s: &str) -> Result<Self, String> {
        let lower = s.to_ascii_lowercase();
        if lower.starts_with("int") {
            return lower.parse().map(Self::Quant);
        }
        Self::ALL.into_iter().find(|d| d.to_string() == lower).ok_or_else(|| format!("unknown element type '{s}'"))
    }
}

impl Serialize for DType {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

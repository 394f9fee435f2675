//! Symbolic dimensions: integer polynomials over named symbols, with floor and ceiling division, minimum and maximum.
//!
//! A [`Dim`] is kept in a normal form (sorted sum of coefficient times product of atoms), so that two dims that are equal
//! as polynomials are equal as values: `(4*n)*2 == 8*n`, `(4*n) floordiv 4 == n`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{
    collections::BTreeMap,
    fmt,
    ops::{Add, Mul, Sub},
    str::FromStr,
    sync::Arc,
};

/// A named quantity that is known only when a graph runs, e.g. `seq` or `image_tokens`, with the range it may take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    /// Identifier: letters, digits and `_`.
    pub name: String,
    /// Smallest value.
    pub min: i64,
    /// Largest value.
    pub max: i64,
}

/// The values of the symbols in one run.
#[derive(Clone, Debug, Default)]
pub struct Bindings(BTreeMap<Arc<str>, Option<i64>>);

impl Bindings {
    /// The value of `name`, if bound.
    pub fn get(&self, name: &str) -> Option<i64> {
        self.0.get(name).copied().flatten()
    }

    /// Binds `name` to `value`, replacing an earlier value.
    pub fn set(&mut self, name: &str, value: i64) {
        match self.0.get_mut(name) {
            Some(v) => *v = Some(value),
            None => {
                self.0.insert(name.into(), Some(value));
            }
        }
    }

    /// Binds nothing any more, but keeps the memory for the symbols that were bound.
    pub fn clear(&mut self) {
        self.0.values_mut().for_each(|v| *v = None);
    }

    /// All symbols and values, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.0.iter().filter_map(|(k, v)| Some((&**k, (*v)?)))
    }
}

impl PartialEq for Bindings {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Bindings {}

impl<'a> FromIterator<(&'a str, i64)> for Bindings {
    fn from_iter<T: IntoIterator<Item = (&'a str, i64)>>(iter: T) -> Self {
        Self(iter.into_iter().map(|(k, v)| (k.into(), Some(v))).collect())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Atom {
    Sym(Arc<str>),
    FloorDiv(Dim, Dim),
    CeilDiv(Dim, Dim),
    Min(Dim, Dim),
    Max(Dim, Dim),
}

/// Functions of two dims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DimFunction {
    FloorDiv,
    CeilDiv,
    Min,
    Max,
}

/// A dimension: an integer expression over symbols, in normal form. Prints as `past + seq`, `4*image_tokens`, `1536`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Dim {
    /// Sorted by product; no zero coefficient; the constant term has the empty product.
    terms: Vec<(Vec<Atom>, i64)>,
}

/// Why a dim has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DimError {
    /// A symbol of the dim is not bound.
    #[error("symbol '{0}' has no value")]
    Unbound(String),
    /// A divisor is zero or the value does not fit 63 bits.
    #[error("'{0}' overflows or divides by zero")]
    Overflow(String),
    /// Text that is not a dim.
    #[error("'{text}' is not a dim: {why}")]
    Syntax {
        /// The text.
        text: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Dim {
    /// The symbol `name`.
    pub fn symbol(name: &str) -> Self {
        Self::atom(Atom::Sym(name.into()))
    }

    fn atom(a: Atom) -> Self {
        Self { terms: vec![(vec![a], 1)] }
    }

    /// The constant, or what takes the place of a number outside `i64`: a dim that has no value. Sums and products with it
    /// have none either.
    fn checked(value: Option<i64>) -> Self {
        value.map_or_else(|| Self::atom(Atom::FloorDiv(1.into(), 0.into())), Self::from)
    }

    /// The value, if no symbol occurs.
    pub fn as_const(&self) -> Option<i64> {
        match self.terms.as_slice() {
            [] => Some(0),
            [(p, c)] if p.is_empty() => Some(*c),
            _ => None,
        }
    }

    /// `(coefficient, symbol)` if the dim is `coefficient * symbol`.
    pub fn as_scaled_symbol(&self) -> Option<(i64, &str)> {
        match self.terms.as_slice() {
            [(p, c)] => match p.as_slice() {
                [Atom::Sym(s)] => Some((*c, s)),
                _ => None,
            },
            _ => None,
        }
    }

    /// The terms that sum up to it: coefficient and factors, each a symbol or a function.
    pub fn as_terms(&self) -> Vec<(i64, Vec<Dim>)> {
        self.terms.iter().map(|(p, c)| (*c, p.iter().cloned().map(Self::atom).collect())).collect()
    }

    /// The function and its operands, if the dim is nothing else.
    pub fn as_function(&self) -> Option<(DimFunction, Dim, Dim)> {
        let [(p, 1)] = self.terms.as_slice() else { return None };
        let (f, a, b) = match p.as_slice() {
            [Atom::FloorDiv(a, b)] => (DimFunction::FloorDiv, a, b),
            [Atom::CeilDiv(a, b)] => (DimFunction::CeilDiv, a, b),
            [Atom::Min(a, b)] => (DimFunction::Min, a, b),
            [Atom::Max(a, b)] => (DimFunction::Max, a, b),
            _ => return None,
        };
        Some((f, a.clone(), b.clone()))
    }

    /// `floor(self / d)`, simplified when every coefficient divides.
    pub fn floor_div(&self, d: &Dim) -> Dim {
        self.exact_div(d).unwrap_or_else(|| match (self.as_const(), d.as_const()) {
            (Some(a), Some(b)) if b != 0 => Self::checked(a.checked_div_euclid(b)),
            _ => Dim::atom(Atom::FloorDiv(self.clone(), d.clone())),
        })
    }

    /// `ceil(self / d)`, simplified when every coefficient divides.
    pub fn ceil_div(&self, d: &Dim) -> Dim {
        self.exact_div(d).unwrap_or_else(|| match (self.as_const(), d.as_const()) {
            (Some(a), Some(b)) if b != 0 => Self::checked(a.checked_neg().and_then(|a| a.checked_div_euclid(b)).and_then(i64::checked_neg)),
            _ => Dim::atom(Atom::CeilDiv(self.clone(), d.clone())),
        })
    }

    /// The smaller of two dims.
    pub fn min_with(&self, o: &Dim) -> Dim {
        match (self.as_const(), o.as_const()) {
            _ if self == o => self.clone(),
            (Some(a), Some(b)) => Dim::from(a.min(b)),
            _ => Dim::atom(Atom::Min(self.clone(), o.clone())),
        }
    }

    /// The larger of two dims.
    pub fn max_with(&self, o: &Dim) -> Dim {
        match (self.as_const(), o.as_const()) {
            _ if self == o => self.clone(),
            (Some(a), Some(b)) => Dim::from(a.max(b)),
            _ => Dim::atom(Atom::Max(self.clone(), o.clone())),
        }
    }

    /// Whether `self >= o` can be seen to hold for all values of the symbols, which are never negative: no term of the
    /// difference is negative.
    pub fn covers(&self, o: &Dim) -> bool {
        (self - o).terms.iter().all(|(p, c)| *c >= 0 && p.iter().all(|a| matches!(a, Atom::Sym(_))))
    }

    /// `self / d` when `d` is a single term that divides every term of `self`.
    pub fn exact_div(&self, d: &Dim) -> Option<Dim> {
        let [(dp, dc)] = d.terms.as_slice() else { return None };
        let mut terms = Vec::with_capacity(self.terms.len());
        for (p, c) in &self.terms {
            if c.checked_rem(*dc)? != 0 {
                return None;
            }
            let mut p = p.clone();
            for a in dp {
                p.remove(p.iter().position(|x| x == a)?);
            }
            terms.push((p, c.checked_div(*dc)));
        }
        Some(Self::normal(terms))
    }

    /// The sum of the terms; a coefficient that is missing was outside `i64`.
    fn normal(terms: impl IntoIterator<Item = (Vec<Atom>, Option<i64>)>) -> Self {
        let mut sum: BTreeMap<Vec<Atom>, Option<i64>> = BTreeMap::new();
        for (p, c) in terms {
            let s = sum.entry(p).or_insert(Some(0));
            *s = s.zip(c).and_then(|(s, c)| s.checked_add(c));
        }
        let by_zero = |a: &Atom| matches!(a, Atom::FloorDiv(_, d) | Atom::CeilDiv(_, d) if d.terms.is_empty());
        // Looked for before terms cancel out, which would give a value to what has none.
        if sum.iter().any(|(p, c)| c.is_none() || p.iter().any(by_zero)) {
            return Self::checked(None);
        }
        Self { terms: sum.into_iter().filter_map(|(p, c)| Some((p, c.filter(|c| *c != 0)?))).collect() }
    }

    /// The value under `b`.
    ///
    /// # Errors
    /// [`DimError::Unbound`] names a symbol without a value; [`DimError::Overflow`] a result outside `i64`.
    pub fn eval(&self, b: &Bindings) -> Result<i64, DimError> {
        let over = || DimError::Overflow(self.to_string());
        let mut sum = 0i64;
        for (p, c) in &self.terms {
            let mut v = *c;
            for a in p {
                let x = match a {
                    Atom::Sym(s) => b.get(s).ok_or_else(|| DimError::Unbound(s.to_string()))?,
                    Atom::FloorDiv(x, y) => x.eval(b)?.checked_div_euclid(y.eval(b)?).ok_or_else(over)?,
                    Atom::CeilDiv(x, y) => {
                        let x = x.eval(b)?.checked_neg().ok_or_else(over)?;
                        x.checked_div_euclid(y.eval(b)?).and_then(i64::checked_neg).ok_or_else(over)?
                    }
                    Atom::Min(x, y) => x.eval(b)?.min(y.eval(b)?),
                    Atom::Max(x, y) => x.eval(b)?.max(y.eval(b)?),
                };
                v = v.checked_mul(x).ok_or_else(over)?;
            }
            sum = sum.checked_add(v).ok_or_else(over)?;
        }
        Ok(sum)
    }

    /// Calls `f` with the name of every symbol that occurs (possibly repeatedly).
    pub fn for_each_symbol(&self, f: &mut impl FnMut(&str)) {
        for a in self.terms.iter().flat_map(|(p, _)| p) {
            match a {
                Atom::Sym(s) => f(s),
                Atom::FloorDiv(x, y) | Atom::CeilDiv(x, y) | Atom::Min(x, y) | Atom::Max(x, y) => {
                    x.for_each_symbol(f);
                    y.for_each_symbol(f);
                }
            }
        }
    }
}

impl From<i64> for Dim {
    fn from(v: i64) -> Self {
        Self { terms: (v != 0).then(|| (vec![], v)).into_iter().collect() }
    }
}

impl From<i32> for Dim {
    fn from(v: i32) -> Self {
        i64::from(v).into()
    }
}

impl From<usize> for Dim {
    fn from(v: usize) -> Self {
        i64::try_from(v).unwrap_or(i64::MAX).into()
    }
}

impl<T: Into<Dim>> Add<T> for &Dim {
    type Output = Dim;
    fn add(self, o: T) -> Dim {
        let terms = self.terms.iter().cloned().chain(o.into().terms);
        Dim::normal(terms.map(|(p, c)| (p, Some(c))))
    }
}

impl<T: Into<Dim>> Sub<T> for &Dim {
    type Output = Dim;
    fn sub(self, o: T) -> Dim {
        let terms = self.terms.iter().cloned().map(|(p, c)| (p, Some(c)));
        Dim::normal(terms.chain(o.into().terms.into_iter().map(|(p, c)| (p, c.checked_neg()))))
    }
}

impl<T: Into<Dim>> Mul<T> for &Dim {
    type Output = Dim;
    fn mul(self, o: T) -> Dim {
        let o = o.into();
        Dim::normal(self.terms.iter().flat_map(|(p, c)| {
            o.terms.iter().map(move |(q, d)| {
                let mut r = [p.clone(), q.clone()].concat();
                r.sort();
                (r, c.checked_mul(*d))
            })
        }))
    }
}

impl From<&Dim> for Dim {
    fn from(d: &Dim) -> Self {
        d.clone()
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sym(s) => f.write_str(s),
            Self::FloorDiv(a, b) => write!(f, "floordiv({a}, {b})"),
            Self::CeilDiv(a, b) => write!(f, "ceildiv({a}, {b})"),
            Self::Min(a, b) => write!(f, "min({a}, {b})"),
            Self::Max(a, b) => write!(f, "max({a}, {b})"),
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("0");
        }
        // The constant term sorts first but reads best last: `seq + 1`.
        let (constant, symbolic): (Vec<_>, Vec<_>) = self.terms.iter().partition(|(p, _)| p.is_empty());
        for (i, (p, c)) in symbolic.into_iter().chain(constant).enumerate() {
            match (i, *c < 0) {
                (0, false) => {}
                (0, true) => f.write_str("-")?,
                (_, false) => f.write_str(" + ")?,
                (_, true) => f.write_str(" - ")?,
            }
            let c = c.unsigned_abs();
            if p.is_empty() || c != 1 {
                write!(f, "{c}{}", if p.is_empty() { "" } else { "*" })?;
            }
            for (j, a) in p.iter().enumerate() {
                write!(f, "{}{a}", if j > 0 { "*" } else { "" })?;
            }
        }
        Ok(())
    }
}

impl FromStr for Dim {
    type Err = DimError;

    /// Parses what `Display` prints (and any sum of products of integers, symbols and the four functions).
    fn from_str(text: &str) -> Result<Self, DimError> {
        let mut p = Parser { text, at: 0, depth: 0 };
        let d = p.sum()?;
        if p.peek().is_some() { p.fail("unexpected text after it") } else { Ok(d) }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn fail<T>(&self, why: &str) -> Result<T, DimError> {
        Err(DimError::Syntax { text: self.text.chars().take(200).collect(), why: format!("{why} (at byte {})", self.at) })
    }

    fn peek(&mut self) -> Option<u8> {
        let b = self.text.as_bytes();
        while b.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        b.get(self.at).copied()
    }

    fn eat(&mut self, c: u8) -> bool {
        let yes = self.peek() == Some(c);
        self.at += usize::from(yes);
        yes
    }

    fn sum(&mut self) -> Result<Dim, DimError> {
        self.depth += 1;
        if self.depth > 16 {
            return self.fail("nested too deeply");
        }
        let negative = self.eat(b'-');
        let first = self.product()?;
        let mut d = if negative { &Dim::from(0) - first } else { first };
        loop {
            if self.eat(b'+') {
                d = &d + self.product()?;
            } else if self.eat(b'-') {
                d = &d - self.product()?;
            } else {
                self.depth -= 1;
                return Ok(d);
            }
        }
    }

    fn product(&mut self) -> Result<Dim, DimError> {
        let mut d = self.factor()?;
        while self.eat(b'*') {
            d = &d * self.factor()?;
        }
        Ok(d)
    }

    fn factor(&mut self) -> Result<Dim, DimError> {
        let Some(c) = self.peek() else { return self.fail("expected an integer or a symbol") };
        let start = self.at;
        let bytes = self.text.as_bytes();
        while bytes.get(self.at).is_some_and(|c| c.is_ascii_alphanumeric() || *c == b'_') {
            self.at += 1;
        }
        let word = &self.text[start..self.at];
        if c.is_ascii_digit() {
            return word.parse::<i64>().map(Dim::from).or_else(|_| self.fail("not an integer"));
        }
        if word.is_empty() {
            return self.fail("expected an integer or a symbol");
        }
        if !self.eat(b'(') {
            return Ok(Dim::symbol(word));
        }
        let a = self.sum()?;
        if !self.eat(b',') {
            return self.fail("expected ','");
        }
        let b = self.sum()?;
        if !self.eat(b')') {
            return self.fail("expected ')'");
        }
        match word {
            "floordiv" => Ok(a.floor_div(&b)),
            "ceildiv" => Ok(a.ceil_div(&b)),
            "min" => Ok(a.min_with(&b)),
            "max" => Ok(a.max_with(&b)),
            _ => self.fail("expected floordiv, ceildiv, min or max"),
        }
    }
}

impl Serialize for Dim {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.as_const() {
            Some(v) => s.serialize_i64(v),
            None => s.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Dim {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Const(i64),
            Text(String),
        }
        match Form::deserialize(d)? {
            Form::Const(v) => Ok(v.into()),
            Form::Text(t) => t.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dim(s: &str) -> Dim {
        s.parse().unwrap()
    }

    #[test]
    fn normal_form_prints_and_parses() {
        for (text, printed) in [
            ("seq + past", "past + seq"),
            ("4*n*2 - n", "7*n"),
            ("1 + n", "n + 1"),
            ("floordiv(4*n, 4)", "n"),
            ("floordiv(n + 1, 2)*3", "3*floordiv(n + 1, 2)"),
            ("n - n", "0"),
            ("-n + 2", "-n + 2"),
            ("min(n, 3) + max(a, b)", "max(a, b) + min(n, 3)"),
        ] {
            let d = dim(text);
            assert_eq!(dim(&d.to_string()), d);
            let mut sorted: Vec<_> = d.to_string().split(' ').map(str::to_owned).collect();
            let mut want: Vec<_> = printed.split(' ').map(str::to_owned).collect();
            sorted.sort();
            want.sort();
            assert_eq!(sorted, want, "{text}");
        }
    }

    #[test]
    fn covers_only_what_holds_for_all_values() {
        for (a, b, holds) in
            [("4*n", "n", true), ("n", "4*n", false), ("n + m", "m", true), ("n", "m", false), ("n*m", "n", false), ("7", "7", true)]
        {
            assert_eq!(dim(a).covers(&dim(b)), holds, "{a} >= {b}");
        }
    }

    #[test]
    fn evaluates_and_refuses() {
        let b = Bindings::from_iter([("n", 7)]);
        assert_eq!(dim("ceildiv(n, 2) + floordiv(n, 2)").eval(&b), Ok(7));
        assert_eq!(dim("m").eval(&b), Err(DimError::Unbound("m".into())));
        assert!(matches!(dim("floordiv(n, 0)").eval(&b), Err(DimError::Overflow(_))));
        assert!(matches!(dim("n*9223372036854775807").eval(&b), Err(DimError::Overflow(_))));
        for bad in ["", "n +", "2n", "f(1, 2)", "min(1)", "n n", &"min(".repeat(100)] {
            assert!(bad.parse::<Dim>().is_err(), "{bad}");
        }
    }

    /// Wherever a number leaves 63 bits, the dim is one without a value, also where the rest cancels it out.
    #[test]
    fn overflow_leaves_no_value() {
        let b = Bindings::from_iter([("n", 1), ("m", 1)]);
        let (max, min) = (i64::MAX, Dim::from(i64::MIN));
        for d in [
            dim(&format!("{max} + {max}")),
            dim(&format!("{max}*n + {max}*n")),
            dim(&format!("{max}*n*2 - {max}*n*2")),
            dim(&format!("{max}*n + {max}*n - {max}*m - {max}*m + 1")),
            dim("n + floordiv(m, 0) - floordiv(m, 0)"),
            dim("n*ceildiv(m, 0) - n*ceildiv(m, 0)"),
            &Dim::from(0) - &min,
            min.floor_div(&Dim::from(-1)),
            min.ceil_div(&Dim::from(3)),
            (&Dim::symbol("n") * &min).floor_div(&Dim::from(-1)),
        ] {
            assert!(matches!(d.eval(&b), Err(DimError::Overflow(_))), "{d}");
            assert!(!d.covers(&Dim::from(0)) && d.as_const().is_none(), "{d}");
        }
    }
}

//! What a text says, between the characters and the program: names as written, repeats not unrolled. `Display` prints it,
//! [`super::parse`] reads it back, [`super::fold`] and [`super::unfold`] go from and to a [`crate::Program`].

use crate::{Literal, Op, Symbol, Type, types::Element, weights::Recipe};
use serde_json::Value;
use std::{
    fmt::{self, Display, Write},
    ops::Range,
};

/// A name as it is written: bare (`layers.0.weight`), indexed by the repeat around it (`layers.{i}.weight`) or a JSON string.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Name(pub(super) String);

/// Characters of a bare name.
pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '+')
}

/// Length and offset of the index at the start of `text`: `{i}`, `{i+1}`, `{i-2}`.
pub(super) fn index_at(text: &str) -> Option<(usize, i64)> {
    let inner = text.strip_prefix("{i")?;
    let end = inner.find('}')?;
    let offset = match inner.get(..end)? {
        "" => 0,
        signed if signed.starts_with(['+', '-']) && signed[1..].bytes().all(|b| b.is_ascii_digit()) => signed.parse::<i32>().ok()?.into(),
        _ => return None,
    };
    Some((end + 3, offset))
}

impl Name {
    pub(super) fn new(name: &str) -> Self {
        let bare = name.starts_with(|c| c != '.') && name.chars().all(is_name_char);
        Self(if bare { name.into() } else { Value::from(name).to_string() })
    }

    pub(super) fn is_quoted(&self) -> bool {
        self.0.starts_with('"')
    }

    /// The name meant, in iteration `i` of the repeat around it.
    pub(super) fn resolve(&self, i: Option<i64>) -> Result<String, String> {
        if self.is_quoted() {
            return serde_json::from_str(&self.0).map_err(|e| format!("bad string: {e}"));
        }
        let mut out = String::with_capacity(self.0.len());
        let mut rest = self.0.as_str();
        while let Some((before, _)) = rest.split_once('{') {
            let (len, offset) = index_at(&rest[before.len()..]).ok_or("expected {i}, {i+1} or the like")?;
            let index = i.ok_or("{i} has a value only inside a repeat")? + offset;
            if index < 0 {
                return Err(format!("{} is {index}", &rest[before.len()..before.len() + len]));
            }
            let _ = write!(out, "{before}{index}");
            rest = &rest[before.len() + len..];
        }
        Ok(out + rest)
    }

    /// The name that stands for `a` in iteration `first` and for `b` in the next.
    pub(super) fn common(first: i64, a: &Name, b: &Name) -> Option<Name> {
        if a == b {
            return Some(a.clone());
        }
        if a.is_quoted() || b.is_quoted() || a.0.split('.').count() != b.0.split('.').count() {
            return None;
        }
        let parts = a.0.split('.').zip(b.0.split('.')).map(|(x, y)| {
            if x == y {
                return Some(x.to_string());
            }
            let (v, w) = (index(x)?, index(y)?);
            let offset = v - first;
            (w == v + 1).then(|| if offset == 0 { "{i}".into() } else { format!("{{i{offset:+}}}") })
        });
        Some(Name(parts.collect::<Option<Vec<_>>>()?.join(".")))
    }

    /// The name written in `scope`: `.attn.weight` for `layers.0.attn.weight` in `layers.0`; of names joined by `+`, each part.
    fn relative_to(&self, scope: &Name) -> String {
        let within = |part: &'_ str| part.strip_prefix(&scope.0).filter(|r| r.starts_with('.')).map(String::from);
        let parts = (!scope.0.is_empty() && !scope.is_quoted()).then(|| self.0.split('+').map(within).collect::<Option<Vec<_>>>());
        parts.flatten().map_or_else(|| self.0.clone(), |parts| parts.join("+"))
    }

    /// The name that is written `self` in `scope`, if it starts with a dot.
    pub(super) fn absolute(self, scope: &Name) -> Name {
        if self.0.starts_with('.') { Name(format!("{}{}", scope.0, self.0.replace("+.", &format!("+{}.", scope.0)))) } else { self }
    }
}

/// The value of a component of a name, if it may be the index of a layer: a number as Rust prints it.
pub(super) fn index(component: &str) -> Option<i64> {
    let v = component.parse::<u32>().ok()?;
    (v.to_string() == component).then_some(v.into())
}

/// Something, or several things repeated with an index.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item<T> {
    One(T),
    Repeat(Range<i64>, Vec<T>),
}

/// A program.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) name: Name,
    pub(super) symbols: Vec<Symbol>,
    pub(super) graphs: Vec<GraphText>,
    /// Recipe of the weights that are not listed; its source `*` is the weight's own name.
    pub(super) default: Recipe,
    pub(super) weights: Vec<Item<WeightText>>,
}

/// A listed weight. Names in the recipe are as written; `*` is the weight's own.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct WeightText {
    pub(super) at: At,
    pub(super) name: Name,
    pub(super) ty: Type,
    pub(super) recipe: Recipe,
}

/// Source of a recipe that stands for the weight's own name.
pub(super) const OWN: &str = "*";

/// Where something stands in the text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct At {
    /// First byte.
    pub(super) start: usize,
    /// Bytes.
    pub(super) len: usize,
}

#[derive(Clone, Debug)]
pub(super) struct GraphText {
    pub(super) at: At,
    pub(super) name: Name,
    pub(super) inputs: Vec<(At, Name, Type)>,
    pub(super) outputs: Vec<(Name, Type)>,
    pub(super) states: Vec<Item<StateText>>,
    pub(super) body: Vec<Statement>,
    pub(super) results: Vec<Operand>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct StateText {
    pub(super) at: At,
    pub(super) past: Name,
    pub(super) present: Name,
    pub(super) ty: Type,
    pub(super) axis: usize,
}

#[derive(Clone, Debug)]
pub(super) enum Statement {
    Node(NodeText),
    Repeat(RepeatText),
}

#[derive(Clone, Debug)]
pub(super) struct NodeText {
    pub(super) at: At,
    pub(super) scope: Name,
    pub(super) outs: Vec<u32>,
    pub(super) op: Op,
    pub(super) args: Vec<Operand>,
    pub(super) types: Vec<Type>,
}

/// A body that is run once per index. The first yields are the carried values' next ones; all are the results in the end.
#[derive(Clone, Debug)]
pub(super) struct RepeatText {
    pub(super) at: At,
    pub(super) range: Range<i64>,
    pub(super) carried: Vec<(u32, Operand)>,
    pub(super) body: Vec<NodeText>,
    pub(super) yields: Vec<Operand>,
    pub(super) results: Vec<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct Operand {
    pub(super) at: At,
    pub(super) kind: OperandKind,
}

#[derive(Clone, Debug)]
pub(super) enum OperandKind {
    /// `%12`: a result of a node or repeat, or a carried value.
    Result(u32),
    /// `%pixel_values`: an input or state.
    Port(Name),
    /// `@norm.weight bf16[64]`
    Weight(Name, Type),
    /// `f32(0.5)`
    Literal(Literal),
}

/// A number or string of an attribute as bare text stands for it, or why it does not.
pub(super) fn bare_value(text: &str) -> Result<Value, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("expected a value".into());
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || c == '-') || !text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b)) {
        return Ok(match text {
            "true" => true.into(),
            "false" => false.into(),
            "null" => Value::Null,
            _ => text.into(),
        });
    }
    if let Ok(v) = text.parse::<i64>() {
        return Ok(v.into());
    }
    if let Ok(v) = text.parse::<u64>() {
        return Ok(v.into());
    }
    // By the standard library, which gives the nearest number.
    let v = text.parse::<f64>().map_err(|_| format!("'{text}' is not a number"))?;
    serde_json::Number::from_f64(v).map(Value::Number).ok_or_else(|| format!("{text} is too large"))
}

/// End of the bare text at the start of `text`: the first comma or closing bracket that no parenthesis encloses.
pub(super) fn bare_end(text: &str) -> usize {
    let mut depth = 0u32;
    let ends = |c: char| {
        match c {
            '(' => depth += 1,
            ')' if depth > 0 => depth -= 1,
            ',' if depth > 0 => {}
            ',' | ']' | '}' | ')' | '\n' | ';' => return true,
            _ => {}
        }
        false
    };
    text.find(ends).unwrap_or(text.len())
}

// Printing.

/// Types stand in this column, where the operation before leaves room.
const TYPE_COLUMN: usize = 92;
/// A graph's head is broken into lines when it is longer.
const LINE: usize = 120;
/// Elements of a literal per line, if it has more.
const LITERAL_ROW: usize = 16;

struct List<'a, T>(&'a [T]);

impl<T: Display> Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, x) in self.0.iter().enumerate() {
            write!(f, "{}{x}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

struct Label(u32);

impl Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

fn labels(outs: &[u32]) -> String {
    List(&outs.iter().map(|o| Label(*o)).collect::<Vec<_>>()).to_string()
}

impl Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name after `%`: quoted if it could be taken for a result's number.
struct PortName<'a>(&'a Name);

impl Display for PortName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.0.0;
        if name.bytes().all(|b| b.is_ascii_digit()) { write!(f, "%\"{name}\"") } else { write!(f, "%{name}") }
    }
}

/// An attribute: numbers as they are, strings bare where [`bare_value`] reads them back.
struct Attribute<'a>(&'a Value);

impl Display for Attribute<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Value::Array(list) => write!(f, "[{}]", List(&list.iter().map(Attribute).collect::<Vec<_>>())),
            Value::Object(map) => {
                write!(f, "{{{}}}", map.iter().map(|(k, v)| format!("{k}={}", Attribute(v))).collect::<Vec<_>>().join(", "))
            }
            Value::String(s) => {
                let safe = s.chars().all(|c| c.is_ascii_alphanumeric() || "_ +*(),-".contains(c)) && bare_end(s) == s.len();
                let bare = safe && s.matches('(').count() == s.matches(')').count() && bare_value(s).is_ok_and(|v| v == *self.0);
                if bare { f.write_str(s) } else { write!(f, "{}", self.0) }
            }
            v => write!(f, "{v}"),
        }
    }
}

impl OperandKind {
    fn print(&self, scope: &Name) -> String {
        match self {
            Self::Result(label) => Label(*label).to_string(),
            Self::Port(name) => PortName(name).to_string(),
            Self::Weight(name, ty) => format!("@{} {ty}", name.relative_to(scope)),
            Self::Literal(l) if l.data.len() > LITERAL_ROW => {
                let rows: Vec<String> = l
                    .data
                    .chunks(LITERAL_ROW)
                    .map(|row| format!("        {}", List(&row.iter().map(|v| Element(*v)).collect::<Vec<_>>())))
                    .collect();
                format!("{}{:?}(\n{}\n      )", l.dtype, l.shape, rows.join(",\n"))
            }
            Self::Literal(l) => l.to_string(),
        }
    }
}

fn operands(args: &[Operand], scope: &Name) -> String {
    List(&args.iter().map(|a| a.kind.print(scope)).collect::<Vec<_>>()).to_string()
}

impl NodeText {
    fn print(&self, out: &mut String, indent: &str) -> fmt::Result {
        let mut line = format!("{indent}{} = {}({})", labels(&self.outs), self.op.name(), operands(&self.args, &self.scope));
        let attributes: Vec<String> = self.op.attributes().iter().map(|(k, v)| format!("{k}={}", Attribute(v))).collect();
        if !attributes.is_empty() {
            write!(line, " {{{}}}", attributes.join(", "))?;
        }
        writeln!(out, "{line:<TYPE_COLUMN$} -> {}", List(&self.types))
    }
}

/// Prints nodes, with a heading wherever the scope changes from `scope`.
fn print_node(out: &mut String, indent: &str, scope: &mut Name, node: &NodeText) -> fmt::Result {
    if node.scope != *scope {
        writeln!(out, "{indent}[{}]", node.scope)?;
        *scope = node.scope.clone();
    }
    node.print(out, indent)
}

impl RepeatText {
    fn print(&self, out: &mut String, indent: &str) -> fmt::Result {
        let no_scope = Name::default();
        let carried: Vec<String> = self.carried.iter().map(|(l, init)| format!("{} = {}", Label(*l), init.kind.print(&no_scope))).collect();
        let carried = if carried.is_empty() { String::new() } else { format!(" ({})", carried.join(", ")) };
        writeln!(out, "{indent}repeat i in {}..{}{carried} {{", self.range.start, self.range.end)?;
        let (inner, mut scope) = (format!("{indent}  "), Name::default());
        self.body.iter().try_for_each(|n| print_node(out, &inner, &mut scope, n))?;
        if self.yields.is_empty() {
            return writeln!(out, "{indent}}}");
        }
        writeln!(out, "{inner}yield {}", operands(&self.yields, &no_scope))?;
        writeln!(out, "{indent}}} -> {}", labels(&self.results))
    }
}

impl Display for StateText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "state {} -> {}: {} grows {}", self.past, self.present, self.ty, self.axis)
    }
}

impl Display for WeightText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "weight {} {} = {}", self.name, self.ty, Expression(&self.recipe))
    }
}

/// A recipe whose sources are names as written.
struct Expression<'a>(&'a Recipe);

impl Display for Expression<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Recipe::Source(name) => f.write_str(name),
            Recipe::Reshape(inner, shape) => write!(f, "reshape({}, {shape:?})", Expression(inner)),
            Recipe::Cast(inner, dtype) => write!(f, "cast({}, {dtype})", Expression(inner)),
            Recipe::Transpose(inner, rows) => write!(f, "transpose({}, {rows})", Expression(inner)),
            Recipe::Concat(parts) => write!(f, "concat({})", List(&parts.iter().map(Expression).collect::<Vec<_>>())),
            Recipe::Interleave(parts, rows) => {
                write!(f, "interleave({rows}, {})", List(&parts.iter().map(Expression).collect::<Vec<_>>()))
            }
            Recipe::Scale(inner, by) => write!(f, "scale({}, {by})", Expression(inner)),
            Recipe::Quantize(inner, scheme, method) => write!(f, "quantize({}, {scheme}, {method})", Expression(inner)),
            Recipe::Codes(name, scheme) => write!(f, "codes({name}, {scheme})"),
        }
    }
}

fn print_items<T: Display>(out: &mut String, indent: &str, items: &[Item<T>]) -> fmt::Result {
    for item in items {
        match item {
            Item::One(x) => writeln!(out, "{indent}{x}")?,
            Item::Repeat(range, xs) => {
                writeln!(out, "{indent}repeat i in {}..{} {{", range.start, range.end)?;
                xs.iter().try_for_each(|x| writeln!(out, "{indent}  {x}"))?;
                writeln!(out, "{indent}}}")?;
            }
        }
    }
    Ok(())
}

impl GraphText {
    fn print(&self, out: &mut String) -> fmt::Result {
        let inputs: Vec<String> = self.inputs.iter().map(|(_, name, ty)| format!("{}: {ty}", PortName(name))).collect();
        let outputs: Vec<String> = self.outputs.iter().map(|(name, ty)| format!("{name}: {ty}")).collect();
        let outputs = outputs.join(", ");
        let head = format!("graph {}({}) -> ({outputs}) {{", self.name, inputs.join(", "));
        if head.chars().count() <= LINE {
            writeln!(out, "{head}")?;
        } else {
            writeln!(out, "graph {}(\n  {}\n) -> ({outputs}) {{", self.name, inputs.join(",\n  "))?;
        }
        print_items(out, "  ", &self.states)?;
        let mut scope = Name::default();
        for s in &self.body {
            match s {
                Statement::Node(n) => print_node(out, "  ", &mut scope, n)?,
                Statement::Repeat(r) => {
                    r.print(out, "  ")?;
                    scope = Name::default();
                }
            }
        }
        if !self.results.is_empty() {
            writeln!(out, "  return {}", operands(&self.results, &Name::default()))?;
        }
        writeln!(out, "}}")
    }
}

impl Display for GraphText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = String::new();
        self.print(&mut out)?;
        f.write_str(&out)
    }
}

impl Display for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = format!("program {}\n", self.name);
        for s in &self.symbols {
            writeln!(out, "symbol {}: {}..={}", Name::new(&s.name), s.min, s.max)?;
        }
        for g in &self.graphs {
            out.push('\n');
            g.print(&mut out)?;
        }
        let default = (self.default != Recipe::Source(OWN.into())).then(|| format!("weights = {}\n", Expression(&self.default)));
        if default.is_some() || !self.weights.is_empty() {
            out.push('\n');
            out += &default.unwrap_or_default();
            print_items(&mut out, "", &self.weights)?;
        }
        f.write_str(&out)
    }
}

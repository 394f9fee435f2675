//! From characters to [`syntax`](super::syntax): a recursive descent over the text, no token list in between.

use super::{Fail, syntax::*, unfold::check_size};
use crate::{DType, Dim, Literal, Op, Symbol, Type, weights::Recipe};
use serde_json::{Map, Value};
use std::ops::Range;
use vlmc_artifact::Scheme;

type Result<T> = std::result::Result<T, Fail>;

/// Bytes of a name.
const MAX_NAME: usize = 1024;
/// Lists in lists of an attribute, recipes in recipes.
const MAX_DEPTH: usize = 8;
/// Bytes of a dim.
const MAX_DIM: usize = 256;

pub(super) fn file(text: &str) -> Result<File> {
    let mut p = Parser { text, at: 0 };
    p.keyword("program")?;
    let name = p.name()?;
    let mut file = File { name, symbols: vec![], graphs: vec![], default: Recipe::Source(OWN.into()), weights: vec![] };
    while p.is_keyword("symbol") {
        file.symbols.push(p.symbol()?);
    }
    while p.is_keyword("graph") {
        file.graphs.push(p.graph()?);
    }
    if p.is_keyword("weights") {
        p.keyword("weights")?;
        p.expect("=")?;
        file.default = p.recipe(0)?;
    }
    while p.is_keyword("weight") || p.is_keyword("repeat") {
        file.weights.push(p.item(Parser::weight)?);
    }
    if p.peek().is_some() { p.fail("expected 'symbol', 'graph', 'weights', 'weight' or 'repeat', in this order") } else { Ok(file) }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        self.fail_at(self.at, message)
    }

    fn fail_at<T>(&self, at: usize, message: impl Into<String>) -> Result<T> {
        Err(Fail { at, message: message.into() })
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// The next character that is not white space or in a comment.
    fn peek(&mut self) -> Option<char> {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            if !trimmed.starts_with(';') {
                return trimmed.chars().next();
            }
            self.at += trimmed.find('\n').unwrap_or(trimmed.len());
        }
    }

    fn eat(&mut self, what: &str) -> bool {
        self.peek();
        let yes = self.rest().starts_with(what);
        self.at += if yes { what.len() } else { 0 };
        yes
    }

    fn expect(&mut self, what: &str) -> Result<()> {
        if self.eat(what) { Ok(()) } else { self.fail(format!("expected '{what}'")) }
    }

    fn is_keyword(&mut self, word: &str) -> bool {
        self.peek();
        self.rest().strip_prefix(word).is_some_and(|after| !after.starts_with(is_name_char))
    }

    fn keyword(&mut self, word: &str) -> Result<()> {
        if !self.is_keyword(word) {
            return self.fail(format!("expected '{word}'"));
        }
        self.at += word.len();
        Ok(())
    }

    fn since(&self, start: usize) -> At {
        At { start, len: self.at - start }
    }

    /// Position of the next item.
    fn start(&mut self) -> usize {
        self.peek();
        self.at
    }

    /// `item`s separated by commas, up to `close`.
    fn list<T>(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = vec![];
        while !self.eat(close) {
            if !items.is_empty() {
                self.expect(",").map_err(|f| Fail { message: format!("expected ',' or '{close}'"), ..f })?;
            }
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn int<T: std::str::FromStr>(&mut self, what: &str) -> Result<T> {
        let start = self.start();
        let sign = usize::from(self.rest().starts_with('-'));
        let digits = self.rest()[sign..].bytes().take_while(u8::is_ascii_digit).count();
        self.at += sign + digits;
        self.text[start..self.at].parse().or_else(|_| self.fail_at(start, format!("expected {what}, a whole number")))
    }

    fn range(&mut self) -> Result<Range<i64>> {
        let start = self.start();
        let from = self.int("the first index")?;
        self.expect("..")?;
        let to = self.int("the index after the last")?;
        if from < 0 || from >= to || to > i64::from(u32::MAX) {
            return self.fail_at(start, format!("{from}..{to} is not a range of at least one index"));
        }
        Ok(from..to)
    }

    fn quoted(&mut self) -> Result<Value> {
        let start = self.start();
        let mut escaped = false;
        let end = self.rest().char_indices().skip(1).find(|(_, c)| {
            let ends = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            ends
        });
        let Some((end, _)) = end else { return self.fail("this string has no end") };
        self.at += end + 1;
        serde_json::from_str(&self.text[start..self.at]).or_else(|e| self.fail_at(start, format!("bad string: {e}")))
    }

    /// A name as written; with `relative`, it may start with a dot.
    fn name_or(&mut self, relative: bool) -> Result<Name> {
        let start = self.start();
        if self.rest().starts_with('"') {
            self.quoted()?;
        } else {
            while let Some(c) = self.rest().chars().next() {
                if is_name_char(c) {
                    self.at += 1;
                } else if let Some((len, _)) = index_at(self.rest()) {
                    self.at += len;
                } else {
                    break;
                }
            }
        }
        let name = &self.text[start..self.at];
        match name {
            "" => self.fail("expected a name"),
            _ if name.len() > MAX_NAME => self.fail_at(start, format!("a name has at most {MAX_NAME} bytes")),
            _ if name.starts_with('.') && !relative => self.fail_at(start, "a name that starts with '.' must be in quotes"),
            _ => Ok(Name(name.into())),
        }
    }

    fn name(&mut self) -> Result<Name> {
        self.name_or(false)
    }

    /// A name that no repeat changes.
    fn plain_name(&mut self) -> Result<String> {
        let start = self.start();
        self.name()?.resolve(None).or_else(|m| self.fail_at(start, m))
    }

    fn dtype(&mut self) -> Result<DType> {
        let start = self.start();
        let len = self.rest().bytes().take_while(u8::is_ascii_alphanumeric).count();
        self.at += len;
        self.text[start..self.at].parse().or_else(|m| self.fail_at(start, m))
    }

    fn dim(&mut self) -> Result<Dim> {
        let start = self.start();
        let text = &self.rest()[..bare_end(self.rest())];
        if text.len() > MAX_DIM {
            return self.fail(format!("a dim has at most {MAX_DIM} bytes"));
        }
        self.at += text.len();
        text.trim().parse().or_else(|e: vlmc_artifact::DimError| self.fail_at(start, e.to_string()))
    }

    fn ty(&mut self) -> Result<Type> {
        let start = self.start();
        let dtype = self.dtype()?;
        self.expect("[")?;
        let shape = self.list("]", Self::dim)?;
        check_size(&shape).or_else(|m| self.fail_at(start, m))?;
        Ok(Type { dtype, shape })
    }

    fn symbol(&mut self) -> Result<Symbol> {
        self.keyword("symbol")?;
        let name = self.plain_name()?;
        self.expect(":")?;
        let min = self.int("the smallest value")?;
        self.expect("..=")?;
        Ok(Symbol { name, min, max: self.int("the largest value")? })
    }

    /// An item, or a repeat of some.
    fn item<T>(&mut self, item: fn(&mut Self) -> Result<T>) -> Result<Item<T>> {
        if !self.is_keyword("repeat") {
            return item(self).map(Item::One);
        }
        let range = self.repeat_head()?;
        self.expect("{")?;
        let mut items = vec![];
        while !self.eat("}") {
            items.push(item(self)?);
        }
        Ok(Item::Repeat(range, items))
    }

    fn repeat_head(&mut self) -> Result<Range<i64>> {
        self.keyword("repeat")?;
        self.keyword("i")?;
        self.keyword("in")?;
        self.range()
    }

    fn graph(&mut self) -> Result<GraphText> {
        let start = self.start();
        self.keyword("graph")?;
        let name = self.name()?;
        let at = self.since(start);
        self.expect("(")?;
        let inputs = self.list(")", |p| {
            let start = p.start();
            p.expect("%")?;
            let (name, ty) = p.port()?;
            Ok((p.since(start), name, ty))
        })?;
        self.expect("->")?;
        self.expect("(")?;
        let outputs = self.list(")", Self::port)?;
        self.expect("{")?;
        let mut states = vec![];
        while self.is_keyword("state") || self.is_repeat_of_states() {
            states.push(self.item(Self::state)?);
        }
        let (mut body, mut scope) = (vec![], Name::default());
        while !self.is_keyword("return") && self.peek() != Some('}') {
            if self.is_keyword("repeat") {
                body.push(Statement::Repeat(self.repeat()?));
                scope = Name::default();
            } else {
                body.extend(self.heading_or_node(&mut scope)?.map(Statement::Node));
            }
        }
        let start = self.at;
        let results = if self.is_keyword("return") {
            self.keyword("return")?;
            self.operands(&Name::default())?
        } else {
            vec![]
        };
        if results.len() != outputs.len() {
            return self.fail_at(start, format!("graph {name} has {} outputs, but returns {}", outputs.len(), results.len()));
        }
        self.expect("}")?;
        Ok(GraphText { at, name, inputs, outputs, states, body, results })
    }

    fn port(&mut self) -> Result<(Name, Type)> {
        let name = self.name()?;
        self.expect(":")?;
        Ok((name, self.ty()?))
    }

    /// Whether states are repeated here, not nodes.
    fn is_repeat_of_states(&mut self) -> bool {
        let start = self.at;
        let yes = self.is_keyword("repeat") && self.repeat_head().is_ok() && self.eat("{") && self.is_keyword("state");
        self.at = start;
        yes
    }

    fn state(&mut self) -> Result<StateText> {
        let start = self.start();
        self.keyword("state")?;
        let past = self.name()?;
        self.expect("->")?;
        let present = self.name()?;
        self.expect(":")?;
        let ty = self.ty()?;
        self.keyword("grows")?;
        let axis = self.int("the axis that grows")?;
        Ok(StateText { at: self.since(start), past, present, ty, axis })
    }

    fn repeat(&mut self) -> Result<RepeatText> {
        let start = self.start();
        let range = self.repeat_head()?;
        let no_scope = Name::default();
        let mut carried = vec![];
        if self.eat("(") {
            carried = self.list(")", |p| {
                let label = p.label()?;
                p.expect("=")?;
                Ok((label, p.operand(&no_scope)?))
            })?;
        }
        let at = self.since(start);
        self.expect("{")?;
        let (mut body, mut scope) = (vec![], Name::default());
        while !self.is_keyword("yield") && self.peek() != Some('}') {
            if self.is_keyword("repeat") {
                return self.fail("repeats do not nest");
            }
            body.extend(self.heading_or_node(&mut scope)?);
        }
        let (mut yields, mut results) = (vec![], vec![]);
        let yield_at = self.at;
        if self.is_keyword("yield") {
            self.keyword("yield")?;
            yields = self.operands(&no_scope)?;
        }
        self.expect("}")?;
        if !yields.is_empty() {
            self.expect("->")?;
            results = self.labels()?;
        }
        if yields.len() < carried.len() || yields.len() != results.len() {
            let message = format!("{} values are carried, {} yielded and {} named after it", carried.len(), yields.len(), results.len());
            return self.fail_at(yield_at, message);
        }
        Ok(RepeatText { at, range, carried, body, yields, results })
    }

    fn heading_or_node(&mut self, scope: &mut Name) -> Result<Option<NodeText>> {
        if self.eat("[") {
            *scope = if self.peek() == Some(']') { Name::default() } else { self.name()? };
            return self.expect("]").map(|()| None);
        }
        if self.peek() != Some('%') {
            return self.fail("expected a scope in brackets, a node, 'repeat', 'yield', 'return' or '}'");
        }
        self.node(scope).map(Some)
    }

    fn label(&mut self) -> Result<u32> {
        self.expect("%")?;
        self.int("the number of a result")
    }

    fn labels(&mut self) -> Result<Vec<u32>> {
        let mut labels = vec![self.label()?];
        while self.eat(",") {
            labels.push(self.label()?);
        }
        Ok(labels)
    }

    fn node(&mut self, scope: &Name) -> Result<NodeText> {
        let start = self.start();
        let outs = self.labels()?;
        self.expect("=")?;
        let op_at = self.start();
        let name = self.plain_name()?;
        self.expect("(")?;
        let args = self.list(")", |p| p.operand(scope))?;
        let attributes = if self.eat("{") { self.attributes(0)? } else { Map::new() };
        let op = Op::parse(&name, &attributes).or_else(|m| self.fail_at(op_at, m))?;
        let known = op.attributes();
        if let Some(other) = attributes.keys().find(|k| !known.contains_key(*k)) {
            return self.fail_at(op_at, format!("{name} has no attribute '{other}'"));
        }
        self.expect("->")?;
        let mut types = vec![self.ty()?];
        while self.eat(",") {
            types.push(self.ty()?);
        }
        Ok(NodeText { at: self.since(start), scope: scope.clone(), outs, op, args, types })
    }

    fn attributes(&mut self, depth: usize) -> Result<Map<String, Value>> {
        let mut map = Map::new();
        self.list("}", |p| {
            let start = p.start();
            let key = p.plain_name()?;
            p.expect("=")?;
            let value_at = p.start();
            let value = p.value(depth)?;
            let dims = match &value {
                Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
                v => v.as_str().into_iter().collect::<Vec<_>>(),
            };
            check_size(&dims).or_else(|m| p.fail_at(value_at, m))?;
            if map.insert(key.clone(), value).is_some() {
                return p.fail_at(start, format!("'{key}' is given twice"));
            }
            Ok(())
        })?;
        Ok(map)
    }

    fn value(&mut self, depth: usize) -> Result<Value> {
        match self.peek() {
            _ if depth > MAX_DEPTH => self.fail("nested too deeply"),
            Some('[') => {
                self.expect("[")?;
                self.list("]", |p| p.value(depth + 1)).map(Value::Array)
            }
            Some('{') => {
                self.expect("{")?;
                self.attributes(depth + 1).map(Value::Object)
            }
            Some('"') => self.quoted(),
            _ => {
                let start = self.at;
                self.at += bare_end(self.rest());
                bare_value(&self.text[start..self.at]).or_else(|m| self.fail_at(start, m))
            }
        }
    }

    fn operands(&mut self, scope: &Name) -> Result<Vec<Operand>> {
        let mut operands = vec![self.operand(scope)?];
        while self.eat(",") {
            operands.push(self.operand(scope)?);
        }
        Ok(operands)
    }

    fn operand(&mut self, scope: &Name) -> Result<Operand> {
        let start = self.start();
        let kind = if self.eat("%") {
            let name = self.name()?;
            if name.0.bytes().all(|b| b.is_ascii_digit()) {
                OperandKind::Result(name.0.parse().or_else(|_| self.fail_at(start, "no result has this number"))?)
            } else {
                OperandKind::Port(name)
            }
        } else if self.eat("@") {
            let name = self.name_or(true)?;
            if name.0.starts_with('.') && (scope.0.is_empty() || scope.is_quoted()) {
                return self.fail_at(start, "there is no scope before it that the name could go on from");
            }
            OperandKind::Weight(name.absolute(scope), self.ty()?)
        } else if self.peek().is_some_and(|c| c.is_ascii_alphabetic()) {
            OperandKind::Literal(self.literal()?)
        } else {
            return self.fail("expected %value, @weight or a literal such as f32(0.5)");
        };
        Ok(Operand { at: self.since(start), kind })
    }

    fn literal(&mut self) -> Result<Literal> {
        let start = self.start();
        let dtype = self.dtype()?;
        let shape: Vec<usize> = if self.eat("[") { self.list("]", |p| p.int("a length"))? } else { vec![] };
        self.expect("(")?;
        let data = self.list(")", |p| {
            let start = p.start();
            p.at += bare_end(p.rest());
            p.text[start..p.at].trim().parse::<f64>().or_else(|_| p.fail_at(start, "expected a number"))
        })?;
        if shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) != Some(data.len()) {
            return self.fail_at(start, format!("the literal has {} elements, which its shape {shape:?} does not hold", data.len()));
        }
        Ok(Literal { dtype, shape, data })
    }

    fn weight(&mut self) -> Result<WeightText> {
        let start = self.start();
        self.keyword("weight")?;
        let name = self.name()?;
        let ty = self.ty()?;
        self.expect("=")?;
        let recipe = self.recipe(0)?;
        Ok(WeightText { at: self.since(start), name, ty, recipe })
    }

    fn recipe(&mut self, depth: usize) -> Result<Recipe> {
        if depth > MAX_DEPTH {
            return self.fail("nested too deeply");
        }
        if self.eat(OWN) {
            return Ok(Recipe::Source(OWN.into()));
        }
        let start = self.start();
        let name = self.name()?;
        if !self.eat("(") {
            return Ok(Recipe::Source(name.0));
        }
        let inner = |p: &mut Self| p.recipe(depth + 1);
        let recipe = match name.0.as_str() {
            "concat" => return self.list(")", inner).map(Recipe::Concat),
            "interleave" => {
                let rows = self.int("a number of rows")?;
                self.expect(",")?;
                return Ok(Recipe::Interleave(self.list(")", inner)?, rows));
            }
            "reshape" => {
                let source = Box::new(inner(self)?);
                self.expect(",")?;
                self.expect("[")?;
                Recipe::Reshape(source, self.list("]", |p| p.int("a length"))?)
            }
            "cast" => {
                let source = Box::new(inner(self)?);
                self.expect(",")?;
                Recipe::Cast(source, self.dtype()?)
            }
            "transpose" => {
                let source = Box::new(inner(self)?);
                self.expect(",")?;
                Recipe::Transpose(source, self.int("a number of rows")?)
            }
            "scale" => {
                let source = Box::new(inner(self)?);
                self.expect(",")?;
                Recipe::Scale(source, self.source()?)
            }
            "quantize" => {
                let source = Box::new(inner(self)?);
                self.expect(",")?;
                let scheme = self.scheme()?;
                self.expect(",")?;
                let (start, method) = (self.start(), self.name()?);
                match method.0.parse() {
                    Ok(method) => Recipe::Quantize(source, scheme, method),
                    Err(why) => return self.fail_at(start, why),
                }
            }
            "codes" => {
                let name = self.source()?;
                self.expect(",")?;
                Recipe::Codes(name, self.scheme()?)
            }
            other => {
                let known = "there are reshape, cast, transpose, concat, scale, quantize and codes";
                return self.fail_at(start, format!("unknown recipe '{other}'; {known}"));
            }
        };
        self.expect(")")?;
        Ok(recipe)
    }

    /// Name of a recipe's source, or `*`.
    fn source(&mut self) -> Result<String> {
        if self.eat(OWN) { Ok(OWN.into()) } else { Ok(self.name()?.0) }
    }

    fn scheme(&mut self) -> Result<Scheme> {
        let start = self.start();
        match self.dtype()? {
            DType::Quant(scheme) => Ok(scheme),
            other => self.fail_at(start, format!("{other} is no quantized type")),
        }
    }
}

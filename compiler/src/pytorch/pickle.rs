//! A pickle machine that can only build descriptions of tensors.
//!
//! A pickle is a program for a stack machine, and its GLOBAL, REDUCE, NEWOBJ and BUILD can call anything that Python can import.
//! Here they know a closed list of names ([`Global`]), and calling one records what it would have made. Every other name, and
//! every opcode that `torch.save` and `torch.jit.save` do not write, is an error.

use safetensors::Dtype;
use std::collections::HashMap;

/// Longest pickle that is read; those of the largest models' shards have a few MiB.
pub(super) const MAX_PICKLE: u64 = 64 << 20;
/// Most values in containers, and containers, and memo entries.
const MAX_OBJECTS: usize = 4 << 20;
/// Most values on the stack.
const MAX_STACK: usize = 1 << 20;
/// Deepest nesting of marks while reading, and of dicts in a state dict.
const MAX_DEPTH: usize = 256;

/// A value on the stack. The bytes of strings stay in the pickle; the rest is an index into [`Pickle`], so that nothing
/// recurses, not even a destructor.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'p> {
    None,
    Bool(bool),
    Int(i64),
    Str(&'p str),
    /// A float or a long integer: not a part of any tensor.
    Other,
    Global(Global),
    Storage(usize),
    Tensor(usize),
    Tuple(usize),
    List(usize),
    Dict(usize),
    /// An instance of a TorchScript class.
    Object(usize),
}

/// The names that a pickle may refer to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Global {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    /// A function that returns its first argument: `torch.Size`, and what TorchScript marks lists with.
    First,
    /// `torch.FloatStorage` and its like.
    Storage(Dtype),
    /// A class of a TorchScript archive, `__torch__.…`; its code is not read.
    TorchScript,
}

/// A run of elements, in an entry of the archive or after the pickles of an old file.
#[derive(Debug)]
pub(super) struct Storage<'p> {
    pub(super) dtype: Dtype,
    pub(super) key: &'p str,
    /// In elements.
    pub(super) len: u64,
}

/// A view of a storage, as written: nothing is checked but that the numbers are not negative.
#[derive(Debug)]
pub(super) struct Tensor {
    /// Index into [`Pickle::storages`].
    pub(super) storage: usize,
    /// In elements, as the strides.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// What a pickle describes.
#[derive(Debug)]
pub(super) struct Pickle<'p> {
    pub(super) root: Value<'p>,
    /// Bytes up to and including its end.
    pub(super) len: usize,
    pub(super) storages: Vec<Storage<'p>>,
    tensors: Vec<Tensor>,
    sequences: Vec<Vec<Value<'p>>>,
    dicts: Vec<Vec<(Value<'p>, Value<'p>)>>,
    /// The states of TorchScript objects.
    objects: Vec<Value<'p>>,
}

impl<'p> Pickle<'p> {
    /// Reads the pickle at the start of `bytes`.
    ///
    /// # Errors
    /// It is malformed, too large, or refers to anything but parts of tensors; the message says where.
    pub(super) fn read(bytes: &'p [u8]) -> Result<Self, String> {
        let pickle =
            Pickle { root: Value::None, len: 0, storages: vec![], tensors: vec![], sequences: vec![], dicts: vec![], objects: vec![] };
        let mut machine = Machine { bytes, at: 0, stack: vec![], marks: vec![], memo: HashMap::new(), objects: 0, pickle };
        loop {
            let at = machine.at;
            if machine.step().map_err(|message| format!("pickle, byte {at}: {message}"))? {
                return Ok(machine.pickle);
            }
        }
    }

    /// The tensors of a state dict by name. Names of nested dicts and modules are joined by dots; a dict under `state_dict` or
    /// `model` is taken for the whole.
    ///
    /// # Errors
    /// There are none, or the nesting is too deep or too wide.
    pub(super) fn tensors(&self) -> Result<Vec<(String, &Tensor)>, String> {
        let wrapped = ["state_dict", "model"].iter().find_map(|key| {
            let inner = if matches!(self.root, Value::Dict(_)) { self.get(key) } else { None };
            inner.filter(|v| self.items(*v).is_some())
        });
        let root = self.items(wrapped.unwrap_or(self.root)).ok_or("holds no state dict: its root is no dict and no TorchScript module")?;
        let (mut found, mut name, mut budget) = (vec![], String::new(), MAX_PICKLE as usize);
        let mut path = vec![(root.iter(), 0)];
        while let Some((items, prefix)) = path.last_mut() {
            name.truncate(*prefix);
            let Some((key, value)) = items.next() else {
                path.pop();
                continue;
            };
            match key {
                Value::Str(key) => name.push_str(key),
                Value::Int(key) => name.push_str(&key.to_string()),
                _ => continue,
            }
            // Dicts may be shared: as a tree, a small pickle can be larger than any memory.
            budget = budget.checked_sub(name.len() + 1).ok_or("has more names of tensors than any model")?;
            if let Value::Tensor(t) = value {
                found.push((name.clone(), &self.tensors[*t]));
            } else if let Some(items) = self.items(*value) {
                if path.len() == MAX_DEPTH {
                    return Err(format!("nests dicts more than {MAX_DEPTH} deep"));
                }
                name.push('.');
                path.push((items.iter(), name.len()));
            }
        }
        if found.is_empty() {
            return Err("holds no named tensors".into());
        }
        Ok(found)
    }

    /// The value of a key of the root.
    pub(super) fn get(&self, key: &str) -> Option<Value<'p>> {
        self.items(self.root)?.iter().find_map(|(k, v)| matches!(k, Value::Str(s) if *s == key).then_some(*v))
    }

    /// The elements of a list or tuple.
    pub(super) fn elements(&self, value: Value<'p>) -> Option<&[Value<'p>]> {
        match value {
            Value::Tuple(i) | Value::List(i) => Some(&self.sequences[i]),
            _ => None,
        }
    }

    /// The items of a dict or of a module's state.
    fn items(&self, value: Value<'p>) -> Option<&[(Value<'p>, Value<'p>)]> {
        match value {
            Value::Dict(i) => Some(&self.dicts[i]),
            Value::Object(i) => match self.objects[i] {
                Value::Dict(i) => Some(&self.dicts[i]),
                _ => None,
            },
            _ => None,
        }
    }
}

struct Machine<'p> {
    bytes: &'p [u8],
    at: usize,
    stack: Vec<Value<'p>>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'p>>,
    /// How much of [`MAX_OBJECTS`] is taken.
    objects: usize,
    pickle: Pickle<'p>,
}

type Step<T> = Result<T, String>;

impl<'p> Machine<'p> {
    /// Runs one opcode; true at the end.
    fn step(&mut self) -> Step<bool> {
        let [opcode] = self.array()?;
        match opcode {
            0x80 => match self.array()? {
                [2..=5] => {}
                [version] => return Err(format!("is written in protocol {version}; 2 to 5 are supported")),
            },
            // FRAME: its length says nothing that we need.
            0x95 => _ = self.array::<8>()?,
            b'.' => {
                self.pickle.root = self.pop()?;
                self.pickle.len = self.at;
                if !self.stack.is_empty() || !self.marks.is_empty() {
                    return Err("ends with values left over".into());
                }
                return Ok(true);
            }

            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' => {
                let [n] = self.array()?;
                self.push(Value::Int(n.into()))?;
            }
            b'M' => {
                let n = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(n.into()))?;
            }
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(n.into()))?;
            }
            0x8a => {
                let [len] = self.array()?;
                let bytes = self.take(len.into())?;
                self.push(long(bytes))?;
            }
            b'G' => {
                self.array::<8>()?;
                self.push(Value::Other)?;
            }
            b'X' => {
                let len = u32::from_le_bytes(self.array()?);
                self.push_str(len as usize)?;
            }
            0x8c => {
                let [len] = self.array()?;
                self.push_str(len.into())?;
            }

            b'(' => {
                if self.marks.len() == MAX_DEPTH * 4 {
                    return Err(format!("nests more than {} deep", MAX_DEPTH * 4));
                }
                self.marks.push(self.stack.len());
            }
            b')' => self.push_tuple(vec![])?,
            0x85..=0x87 => {
                let mut values = (0x85..=opcode).map(|_| self.pop()).collect::<Step<Vec<_>>>()?;
                values.reverse();
                self.push_tuple(values)?;
            }
            b't' => {
                let values = self.pop_to_mark()?;
                self.push_tuple(values)?;
            }
            b']' => {
                self.grow(1)?;
                self.pickle.sequences.push(vec![]);
                self.push(Value::List(self.pickle.sequences.len() - 1))?;
            }
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' => {
                let values = self.pop_to_mark()?;
                self.append(values)?;
            }
            b'}' => self.push_dict()?,
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])?;
            }
            b'u' => {
                let values = self.pop_to_mark()?;
                self.set(&values)?;
            }

            b'q' => {
                let [at] = self.array()?;
                self.memorize(at.into())?;
            }
            b'r' => {
                let at = u32::from_le_bytes(self.array()?);
                self.memorize(at)?;
            }
            0x94 => self.memorize(self.memo.len() as u32)?,
            b'h' => {
                let [at] = self.array()?;
                self.recall(at.into())?;
            }
            b'j' => {
                let at = u32::from_le_bytes(self.array()?);
                self.recall(at)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(global(module, name)?))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Str(module), Value::Str(name)) = (module, name) else {
                    return Err("names a global by something else than strings".into());
                };
                self.push(Value::Global(global(module, name)?))?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id).ok_or("refers to an object outside of the pickle that is no storage")?;
                self.grow(1)?;
                self.pickle.storages.push(storage);
                self.push(Value::Storage(self.pickle.storages.len() - 1))?;
            }
            b'R' => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.reduce(callable, args)?;
            }
            0x81 => {
                let (args, class) = (self.pop()?, self.pop()?);
                if !matches!(class, Value::Global(Global::TorchScript)) || self.pickle.elements(args).is_none_or(|a| !a.is_empty()) {
                    return Err("makes an object that is no TorchScript module".into());
                }
                self.grow(1)?;
                self.pickle.objects.push(Value::None);
                self.push(Value::Object(self.pickle.objects.len() - 1))?;
            }
            b'b' => {
                let state = self.pop()?;
                match self.top()? {
                    Value::Object(i) => self.pickle.objects[i] = state,
                    // Attributes of a dict, such as the `_metadata` of a state dict.
                    Value::Dict(_) => {}
                    _ => return Err("sets the state of what is no dict and no TorchScript module".into()),
                }
            }
            _ => return Err(format!("has opcode {opcode:#04x}, which torch.save does not write")),
        }
        Ok(false)
    }

    /// Records what calling an allowed global would make.
    fn reduce(&mut self, callable: Value<'p>, args: Value<'p>) -> Step<()> {
        let (Value::Global(global), Some(args)) = (callable, self.pickle.elements(args)) else {
            return Err("calls what is no function".into());
        };
        match (global, args) {
            (Global::RebuildTensor, args) => {
                let tensor = self.tensor(args).ok_or("describes a tensor in a way that is not supported")?;
                self.grow(1 + 2 * tensor.shape.len())?;
                self.pickle.tensors.push(tensor);
                self.push(Value::Tensor(self.pickle.tensors.len() - 1))
            }
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => self.push(*tensor),
            (Global::OrderedDict, []) => self.push_dict(),
            (Global::First, [value, ..]) => self.push(*value),
            _ => Err("calls a function with other arguments than torch.save writes".into()),
        }
    }

    /// `(storage, offset, shape, strides, requires_grad, hooks)`, and since torch 1.13 flags, of which we want none.
    fn tensor(&self, args: &[Value<'p>]) -> Option<Tensor> {
        let [Value::Storage(storage), offset, shape, strides, _, _, flags @ ..] = args else { return None };
        let plain = match flags {
            [] | [Value::None] => true,
            [flags] => self.pickle.items(*flags)?.is_empty(),
            _ => false,
        };
        let natural = |v: &Value<'p>| if let Value::Int(n) = v { u64::try_from(*n).ok() } else { None };
        let naturals = |v: &Value<'p>| self.pickle.elements(*v)?.iter().map(natural).collect::<Option<Vec<_>>>();
        plain.then_some(Tensor { storage: *storage, offset: natural(offset)?, shape: naturals(shape)?, strides: naturals(strides)? })
    }

    /// `("storage", type, key, device, length)`, and in old files a view, of which we want none.
    fn storage(&self, id: Value<'p>) -> Option<Storage<'p>> {
        match *self.pickle.elements(id)? {
            [Value::Str("storage"), Value::Global(Global::Storage(dtype)), Value::Str(key), Value::Str(_), Value::Int(len)]
            | [
                Value::Str("storage"),
                Value::Global(Global::Storage(dtype)),
                Value::Str(key),
                Value::Str(_),
                Value::Int(len),
                Value::None,
            ] => Some(Storage { dtype, key, len: len.try_into().ok()? }),
            _ => None,
        }
    }

    fn append(&mut self, values: Vec<Value<'p>>) -> Step<()> {
        let Value::List(i) = self.top()? else { return Err("appends to what is no list".into()) };
        self.grow(values.len())?;
        self.pickle.sequences[i].extend(values);
        Ok(())
    }

    /// Adds keys and values, by turns, to the dict on top.
    fn set(&mut self, values: &[Value<'p>]) -> Step<()> {
        let Value::Dict(i) = self.top()? else { return Err("sets items of what is no dict".into()) };
        self.grow(values.len())?;
        let (pairs, []) = values.as_chunks() else { return Err("sets a key without a value".into()) };
        self.pickle.dicts[i].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn memorize(&mut self, at: u32) -> Step<()> {
        self.grow(1)?;
        let top = self.top()?;
        self.memo.insert(at, top);
        Ok(())
    }

    fn recall(&mut self, at: u32) -> Step<()> {
        let value = *self.memo.get(&at).ok_or_else(|| format!("refers to memo {at}, which is not set"))?;
        self.push(value)
    }

    /// Takes note of `n` more things to keep.
    fn grow(&mut self, n: usize) -> Step<()> {
        self.objects += n;
        if self.objects > MAX_OBJECTS { Err(format!("has more than {MAX_OBJECTS} objects")) } else { Ok(()) }
    }

    fn push(&mut self, value: Value<'p>) -> Step<()> {
        if self.stack.len() == MAX_STACK {
            return Err(format!("puts more than {MAX_STACK} values on the stack"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn push_tuple(&mut self, values: Vec<Value<'p>>) -> Step<()> {
        self.grow(1 + values.len())?;
        self.pickle.sequences.push(values);
        self.push(Value::Tuple(self.pickle.sequences.len() - 1))
    }

    fn push_dict(&mut self) -> Step<()> {
        self.grow(1)?;
        self.pickle.dicts.push(vec![]);
        self.push(Value::Dict(self.pickle.dicts.len() - 1))
    }

    fn push_str(&mut self, len: usize) -> Step<()> {
        let text = str::from_utf8(self.take(len)?).map_err(|_| "has a string that is not UTF-8")?;
        self.push(Value::Str(text))
    }

    /// The top value above the last mark.
    fn top(&self) -> Step<Value<'p>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..].last().copied().ok_or_else(|| "takes a value from an empty stack".into())
    }

    fn pop(&mut self) -> Step<Value<'p>> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Value<'p>>> {
        let mark = self.marks.pop().ok_or("takes values up to a mark, and there is none")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, len: usize) -> Step<&'p [u8]> {
        let bytes = self.bytes[self.at..].get(..len).ok_or("ends too early; copy or download the file again")?;
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    fn line(&mut self) -> Step<&'p str> {
        let len = self.bytes[self.at..].iter().take(1024).position(|b| *b == b'\n').ok_or("has the name of a global without an end")?;
        let line = self.take(len + 1)?;
        str::from_utf8(&line[..len]).map_err(|_| "has the name of a global that is not UTF-8".into())
    }
}

/// Two's complement of any length.
fn long(bytes: &[u8]) -> Value<'static> {
    let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
    let mut word = [fill; 8];
    match word.get_mut(..bytes.len()) {
        Some(low) => low.copy_from_slice(bytes),
        None => return Value::Other,
    }
    Value::Int(i64::from_le_bytes(word))
}

fn global(module: &str, name: &str) -> Step<Global> {
    Ok(match (module, name) {
        ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch", "Size") => Global::First,
        ("torch.jit._pickle", "build_intlist" | "build_doublelist" | "build_boollist" | "build_tensorlist" | "restore_type_tag") => {
            Global::First
        }
        ("torch", "DoubleStorage") => Global::Storage(Dtype::F64),
        ("torch", "FloatStorage") => Global::Storage(Dtype::F32),
        ("torch", "HalfStorage") => Global::Storage(Dtype::F16),
        ("torch", "BFloat16Storage") => Global::Storage(Dtype::BF16),
        ("torch", "LongStorage") => Global::Storage(Dtype::I64),
        ("torch", "IntStorage") => Global::Storage(Dtype::I32),
        ("torch", "ShortStorage") => Global::Storage(Dtype::I16),
        ("torch", "CharStorage") => Global::Storage(Dtype::I8),
        ("torch", "ByteStorage") => Global::Storage(Dtype::U8),
        ("torch", "BoolStorage") => Global::Storage(Dtype::BOOL),
        _ if module == "__torch__" || module.starts_with("__torch__.") => Global::TorchScript,
        _ => {
            let name: String = format!("{module}.{name}").chars().take(120).map(|c| if c.is_control() { '?' } else { c }).collect();
            return Err(format!(
                "refers to '{name}', which is no part of a tensor; loading it could run code, so it is refused: \
                 convert the file to safetensors, in a place where you trust it"
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(bytes: &[u8]) -> String {
        match Pickle::read(bytes).and_then(|p| p.tensors().map(|t| t.len())) {
            Err(message) => message,
            Ok(n) => panic!("{n} tensors"),
        }
    }

    #[test]
    fn integers() {
        for (bytes, expected) in [(&[][..], Some(0)), (&[0xff], Some(-1)), (&[0, 1], Some(256)), (&[0xff; 8], Some(-1)), (&[0; 9], None)] {
            assert_eq!(if let Value::Int(n) = long(bytes) { Some(n) } else { None }, expected);
        }
    }

    #[test]
    fn ordered_dict_and_protocol_4() {
        // torch.save(..., pickle_protocol=4) names globals by strings on the stack.
        let mut bytes = b"\x80\x04\x95\0\0\0\0\0\0\0\0\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94.trailing".to_vec();
        let pickle = Pickle::read(&bytes).unwrap();
        assert!(matches!(pickle.root, Value::Dict(0)));
        assert_eq!(pickle.len, bytes.len() - 8);
        bytes[12] = 0xff;
        assert!(error(&bytes).contains("ends too early"), "{}", error(&bytes));
    }

    #[test]
    fn refused() {
        for (bytes, expected) in [
            (&b""[..], "byte 0: ends too early"),
            (b"\x80\x01N.", "is written in protocol 1; 2 to 5 are supported"),
            (
                b"\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R.",
                "byte 2: refers to 'posix.system', which is no part of a tensor; loading it could run code",
            ),
            (b"\x8c\x08builtins\x8c\x04eval\x93.", "refers to 'builtins.eval'"),
            (b"c__torchx__\nM\n.", "refers to '__torchx__.M'"),
            (b"ctorch\n\x1b[2J\n.", "refers to 'torch.?[2J'"),
            (b"cnumpy", "the name of a global without an end"),
            (b"(S'ls'\nios\nsystem\n.", "byte 1: has opcode 0x53, which torch.save does not write"),
            (b"(iposix\nsystem\n.", "has opcode 0x69"),
            (b"ctorch\nFloatStorage\n)R.", "calls a function with other arguments"),
            (b"c__torch__\nM\n)R.", "calls a function with other arguments"),
            (b"ccollections\nOrderedDict\n)\x81.", "makes an object that is no TorchScript module"),
            (b"N)R.", "calls what is no function"),
            (b")}b.", "sets the state of what is no dict"),
            (b"NQ.", "that is no storage"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "describes a tensor in a way that is not supported"),
            (b"ctorch._utils\n_rebuild_parameter\nN\x85R.", "calls a function with other arguments"),
            (b"}(Nu.", "a key without a value"),
            (b"}NNa.", "appends to what is no list"),
            (b"]NNs.", "sets items of what is no dict"),
            (b"}(N.", "values left over"),
            (b"N(0.", "has opcode 0x30"),
            (b"N(a.", "from an empty stack"),
            (b"t.", "up to a mark, and there is none"),
            (b"h\x07.", "refers to memo 7, which is not set"),
            (b"X\x01\0\0\0\xff.", "not UTF-8"),
            (b"N.", "its root is no dict"),
            (b"}.", "holds no named tensors"),
        ] {
            let message = error(bytes);
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }

    #[test]
    fn bombs() {
        assert!(error(&[b'('; 9999]).contains("nests more than 1024 deep"));
        assert!(error(&vec![b'N'; MAX_STACK + 1]).contains("values on the stack"));
        let tuples = [&b")"[..], &vec![0x85; MAX_OBJECTS / 2 + 1], b"."].concat();
        assert!(error(&tuples).contains("objects"));
        // A dict in itself.
        assert!(error(b"}q\0X\x01\0\0\0ah\0s.").contains("nests dicts more than 256 deep"));
        // Each dict has the one in it twice.
        let (mut bytes, mut ends) = (vec![], vec![]);
        for i in 0..60 {
            bytes.extend([&b"}q"[..], &[i], b"(X\x01\0\0\0a"].concat());
            ends.push([&b"X\x01\0\0\0bh"[..], &[i + 1], b"u"].concat());
        }
        bytes.extend(b"}q\x3c");
        bytes.extend(ends.into_iter().rev().flatten());
        bytes.push(b'.');
        assert!(error(&bytes).contains("more names of tensors than any model"), "{}", error(&bytes));
    }
}

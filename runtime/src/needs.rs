//! How much memory a request takes, told from its sizes alone: nothing is run and no weight is read.

use crate::{
    Error, Result,
    binding::{extents, in_range, solve},
    cpu::{self, Working},
    cross,
    pipeline::{PREFILL_BLOCK, runs_whole},
    processor::{self, Outline},
};
use std::collections::{BTreeMap, BTreeSet};
use vlmc_artifact::{Bindings, Dim, Entry, Manifest, Port, Positions, PromptRules, State, Task, program::Program};

/// A request, by its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Width and height of its pictures.
    pub pictures: Vec<[usize; 2]>,
    /// Positions in the cache when the answer is complete: the prompt, with as many as the pictures take, and the answer without
    /// its last token, which is not run. Models without prompts have none.
    pub context: usize,
    /// Tokens of the answer.
    pub new_tokens: usize,
    /// Threads that the model runs with.
    pub threads: usize,
}

/// A run of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Name of the entry.
    pub entry: String,
    /// Values of the symbols.
    pub symbols: Bindings,
    /// Absent for a model that another library than vlmc's own runtime runs.
    pub working: Option<Working>,
}

/// Bytes that a request takes, besides the weights and what the process takes without any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Runs of entries: of the pictures the one that takes the most, of the blocks of the prompt the one that takes the most, and the
    /// last token.
    pub runs: Vec<Run>,
    /// KV cache at the end.
    pub cache: usize,
    /// Pictures, their pixels and features, embeddings and logits: what there is of them at once.
    pub tensors: usize,
}

impl Needs {
    /// Working memory, which all entries share; `None` if it is not known.
    pub fn arena(&self) -> Option<usize> {
        self.runs.iter().map(|r| Some(r.working?.arena)).try_fold(0, |most, arena| Some(arena?.max(most)))
    }
}

/// What a request to a model takes: all of it if there is a program, which must have been checked or come from the compiler, and
/// else the KV cache only.
///
/// # Errors
/// The model does not take such a request.
pub fn needs(manifest: &Manifest, program: Option<&Program>, request: &Request) -> Result<Needs> {
    let plan = Planner { manifest, program, request };
    match &manifest.task {
        Task::Generate(rules) => plan.answer(rules),
        Task::Contrast(rules) => plan.forward(rules.max_length),
        Task::Classify { .. } => plan.forward(0),
    }
}

type Shapes = BTreeMap<String, Vec<usize>>;

struct Planner<'a> {
    manifest: &'a Manifest,
    program: Option<&'a Program>,
    request: &'a Request,
}

/// Pictures, seen.
#[derive(Default)]
struct Seen {
    /// The run that takes the most.
    run: Option<Run>,
    /// Their features, put together.
    features: Shapes,
    /// Tiles that the decoder attends to, and the rows that they take in its states.
    tiles: usize,
    rows: usize,
    /// Most bytes of pixels and features at once.
    tensors: usize,
}

/// Tokens, run.
struct Pass {
    runs: [Run; 2],
    /// Bytes of embeddings, positions and masks.
    inputs: usize,
    logits: usize,
}

/// Bytes of a tensor of numbers of `size` bytes. Saturates.
fn bytes(shape: &[usize], size: usize) -> usize {
    shape.iter().fold(size, |n, d| n.saturating_mul(*d))
}

fn floats(shapes: &Shapes) -> usize {
    shapes.values().map(|s| bytes(s, size_of::<f32>())).fold(0, usize::saturating_add)
}

impl Planner<'_> {
    fn entry(&self, name: &str) -> Result<&Entry> {
        let entry = self.manifest.entries.iter().find(|e| e.name == name);
        entry.ok_or_else(|| Error::Input(format!("the artifact has no entry '{name}'")))
    }

    fn outlines(&self) -> Result<Vec<Outline>> {
        let pictures = &self.request.pictures;
        let missing = || Error::Unsupported("the checkpoint had no preprocessor_config.json, so the artifact takes no pictures".into());
        let outline = |[width, height]: &[usize; 2]| {
            processor::outline(self.manifest.processor.as_ref().ok_or_else(missing)?, *width, *height, pictures.len())
        };
        pictures.iter().map(outline).collect()
    }

    /// A run of an entry on tensors of these shapes, others being empty, after as many rows of each state as `past` says.
    fn run(&self, entry: &Entry, shapes: &Shapes, past: impl Fn(&State) -> usize) -> Result<Run> {
        let mut symbols = Bindings::default();
        for port in &entry.inputs {
            if let Some(shape) = shapes.get(&port.name).filter(|s| s.len() >= port.shape.len()) {
                // Leading axes are joined, as in `forward::fit`.
                let (lead, rest) = shape.split_at(shape.len() + 1 - port.shape.len().max(1));
                solve(&port.shape, &[&[lead.iter().product()], rest].concat(), &mut symbols);
            }
        }
        for state in &entry.states {
            if let Some(axis) = state.shape.get(state.axis) {
                solve(std::slice::from_ref(axis), &[past(state)], &mut symbols);
            }
        }
        for port in &entry.inputs {
            solve(&port.shape, &vec![0; port.shape.len()], &mut symbols);
        }
        let fail = |why: String| Error::Input(format!("{}: {why}", entry.name));
        in_range(&self.manifest.symbols, &symbols).map_err(fail)?;
        let function = self.program.and_then(|p| p.functions.iter().find(|f| f.name == entry.name));
        let working = function.map(|f| cpu::working(f, &symbols, self.request.threads)).transpose().map_err(fail)?;
        Ok(Run { entry: entry.name.clone(), symbols, working })
    }

    fn outputs(&self, entry: &Entry, run: &Run) -> Result<Shapes> {
        let shape = |p: &Port| extents(&p.shape, &run.symbols).map_err(|why| Error::Input(format!("{}: {why}", entry.name)));
        entry.outputs.iter().map(|p| Ok((p.name.clone(), shape(p)?))).collect()
    }

    /// A prompt with pictures and its answer, as a [`crate::Conversation`] runs them.
    fn answer(&self, rules: &PromptRules) -> Result<Needs> {
        let &Request { ref pictures, context, new_tokens, .. } = self.request;
        let outlines = self.outlines()?;
        let tokens: usize = outlines.iter().map(|o| o.tokens).sum();
        let prompt = (context + 1).saturating_sub(new_tokens.max(1));
        if context > rules.max_positions {
            return Err(Error::Input(format!("a context of {context} tokens is more than the model's of {}", rules.max_positions)));
        }
        if prompt <= tokens {
            let wanted = format!("{tokens} tokens of pictures, a prompt and an answer of {new_tokens}");
            return Err(Error::Input(format!("a context of {context} tokens has no room for {wanted}")));
        }
        let seen = self.see(&outlines)?;
        let features = floats(&seen.features);
        // Those of several pictures are put together.
        let joined = if pictures.len() > 1 { 2 * features } else { features };
        let block = if runs_whole(rules, !pictures.is_empty()) { prompt } else { PREFILL_BLOCK };
        let (prompt_runs, most) = self.prompt(rules, [prompt, block], &seen)?;
        let mut tensors = seen.tensors.max(joined + most);
        let mut runs: Vec<Run> = seen.run.iter().cloned().chain(prompt_runs).collect();
        if context > 1 {
            let last = self.pass(rules, [1, context - 1], &Shapes::new(), &seen)?;
            runs.extend(last.runs);
            // The logits of one token are there until those of the next one are.
            tensors = tensors.max(features + last.inputs + 2 * last.logits);
        }
        let pixels: usize = pictures.iter().map(|size| bytes(size, 3)).sum();
        // A state that grows stands beside its copy for a moment.
        let grows = context > prompt.min(block);
        Ok(Needs { cache: self.cache(&runs, grows, seen.rows)?, runs, tensors: pixels + tensors })
    }

    /// Pictures one after the other.
    fn see(&self, outlines: &[Outline]) -> Result<Seen> {
        let mut seen = Seen::default();
        // There are pixels until they are seen, and features from then on.
        let (mut pixels, mut features) = (outlines.iter().map(|o| floats(&o.inputs)).sum::<usize>(), 0);
        for outline in outlines {
            let vision = self.entry("vision")?;
            let run = self.run(vision, &outline.inputs, |_| 0)?;
            let outputs = self.outputs(vision, &run)?;
            features += floats(&outputs);
            seen.tensors = seen.tensors.max(pixels + features);
            pixels -= floats(&outline.inputs);
            for (name, shape) in outputs {
                let Some((width, lead)) = shape.split_last() else { continue };
                seen.features.entry(name).or_insert_with(|| vec![0, *width])[0] += lead.iter().product::<usize>();
            }
            let arena = |r: &Run| r.working.map_or(0, |w| w.arena);
            if seen.run.as_ref().is_none_or(|largest| arena(largest) < arena(&run)) {
                seen.run = Some(run);
            }
        }
        // Where the decoder attends to pictures, it takes `[batch, tiles, tokens, hidden]`.
        if let Some(port) = self.entry("decoder")?.inputs.iter().find(|p| p.name == cross::STATES) {
            let constant = |axis: usize| port.shape.get(axis).and_then(Dim::as_const).and_then(|d| usize::try_from(d).ok());
            let (Some(tokens), Some(hidden)) = (constant(2), constant(3)) else {
                return Err(Error::Input(format!("'{}' must be [batch, tiles, tokens, hidden]", port.name)));
            };
            let elements = seen.features.remove(cross::STATES).map_or(0, |s| bytes(&s, 1));
            seen.tiles = elements.checked_div(tokens * hidden).unwrap_or(0);
            seen.rows = seen.tiles * tokens;
            seen.features.insert(cross::STATES.into(), vec![1, seen.tiles, tokens, hidden]);
        }
        Ok(seen)
    }

    /// The block of tokens of a prompt that works in the most memory, and the most bytes of inputs and logits of any.
    fn prompt(&self, rules: &PromptRules, [prompt, block]: [usize; 2], seen: &Seen) -> Result<([Run; 2], usize)> {
        // Memory grows with the tokens of a block and those before it: the first, the last whole one, and what is left.
        let last = prompt.saturating_sub(1) / block.max(1);
        let mut largest: Option<[Run; 2]> = None;
        let mut most = 0;
        for i in BTreeSet::from([0, last.saturating_sub(1), last]) {
            let from = i * block;
            let new = block.min(prompt - from);
            // Each block may be all placeholders.
            let cut = |(name, shape): (&String, &Vec<usize>)| match &shape[..] {
                [rows, width] => Some((name.clone(), vec![*rows.min(&new), *width])),
                _ => (from == 0).then(|| (name.clone(), shape.clone())),
            };
            let features: Shapes = seen.features.iter().filter_map(cut).collect();
            let copied = if last > 0 { floats(&features) } else { 0 };
            let pass = self.pass(rules, [new, from], &features, seen)?;
            most = most.max(copied + pass.inputs + pass.logits);
            let arena = |runs: &[Run; 2]| runs.iter().map(|r| r.working.map_or(0, |w| w.arena)).max();
            if largest.as_ref().is_none_or(|l| arena(l) <= arena(&pass.runs)) {
                largest = Some(pass.runs);
            }
        }
        Ok((largest.ok_or_else(|| Error::Input("a prompt must have tokens".into()))?, most))
    }

    /// `new` tokens after `past`, with these features among them.
    fn pass(&self, rules: &PromptRules, [new, past]: [usize; 2], features: &Shapes, seen: &Seen) -> Result<Pass> {
        let (embed, decoder) = (self.entry("embed")?, self.entry("decoder")?);
        let mut shapes = features.clone();
        shapes.extend([
            ("input_ids".into(), vec![1, new]),
            ("images_seq_mask".into(), vec![1, new]),
            ("position_ids".into(), if matches!(rules.positions, Positions::Mrope { .. }) { vec![3, 1, new] } else { vec![1, new] }),
            ("attention_mask".into(), vec![1, past + new]),
            ("prompt_length".into(), vec![1]),
            ("logit_positions".into(), vec![1]),
            (cross::MASK.into(), vec![1, new, seen.tiles]),
        ]);
        let embedding = self.run(embed, &shapes, |_| 0)?;
        shapes.extend(self.outputs(embed, &embedding)?);
        let rows = |s: &State| if s.follows_text() { past } else { seen.rows };
        let decoding = self.run(decoder, &shapes, |s| if past == 0 { 0 } else { rows(s) })?;
        let logits = floats(&self.outputs(decoder, &decoding)?);
        let own = decoder.inputs.iter().filter(|p| !features.contains_key(&p.name));
        let inputs = own.filter_map(|p| Some(bytes(shapes.get(&p.name)?, p.dtype.size()))).sum();
        Ok(Pass { runs: [embedding, decoding], inputs, logits })
    }

    /// The states at the end, of which those of pictures have `rows`.
    fn cache(&self, runs: &[Run], grows: bool, rows: usize) -> Result<usize> {
        let context = self.request.context;
        let (mut total, mut largest) = (0, 0);
        for run in runs.iter().rev().take(1) {
            for state in &self.entry(&run.entry)?.states {
                let mut shape = extents(&state.shape, &run.symbols).map_err(Error::Input)?;
                if let Some(axis) = shape.get_mut(state.axis) {
                    *axis = if state.follows_text() { context } else { rows };
                }
                let size = match self.program {
                    Some(_) => {
                        let shape = shape.try_into().map_err(|_| Error::Input("a state must have 4 axes".into()))?;
                        cpu::state_bytes(shape, state.dtype)
                    }
                    None => bytes(&shape, state.dtype.size()),
                };
                (total, largest) = (total + size, largest.max(size));
            }
        }
        Ok(if self.program.is_some() && grows { total + largest } else { total })
    }

    /// A model without prompts, which runs pictures of one size together, and one text.
    fn forward(&self, text: usize) -> Result<Needs> {
        let mut outlines = self.outlines()?;
        let together = outlines.iter().all(|o| Some(o) == outlines.first());
        if together {
            let count = outlines.len();
            outlines.truncate(1);
            outlines.iter_mut().flat_map(|o| o.inputs.values_mut()).filter_map(|s| s.first_mut()).for_each(|n| *n *= count);
        }
        let texts = Shapes::from([("input_ids".to_string(), vec![1, text]), ("attention_mask".to_string(), vec![1, text])]);
        let (mut runs, mut tensors) = (vec![], self.request.pictures.iter().map(|size| bytes(size, 3)).sum::<usize>());
        for outline in &outlines {
            let mut shapes = outline.inputs.clone();
            if text > 0 {
                shapes.extend(texts.clone());
            }
            for entry in &self.manifest.entries {
                if entry.inputs.iter().all(|p| shapes.contains_key(&p.name)) {
                    let run = self.run(entry, &shapes, |_| 0)?;
                    shapes.extend(self.outputs(entry, &run)?);
                    runs.push(run);
                }
            }
            tensors += floats(&shapes);
        }
        Ok(Needs { runs, cache: 0, tensors })
    }
}

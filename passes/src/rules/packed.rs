//! Linears of one operand as one linear, whose weight is theirs one after the other.

use super::Match;
use vlmc_ir::{
    Builder, Node, Op, Type, Val, ValueId,
    ops::Linear,
    weights::{Recipe, WeightDef},
};

/// A linear over packed weights.
pub(super) struct Packed {
    op: Linear,
    /// Name and type of the weight, then of the bias if there is one.
    weights: Vec<(String, Type)>,
    /// Definitions of the weights.
    pub(super) defs: Vec<(String, WeightDef)>,
    /// Columns of the result that are those of each linear.
    pub(super) widths: Vec<usize>,
}

impl Packed {
    /// # Errors
    /// Why these linears cannot be one.
    pub(super) fn new(m: &Match<'_>, linears: &[&Node]) -> Result<Self, String> {
        let [first, rest @ ..] = linears else { return Err("there are no linears".into()) };
        let Op::Linear(op) = &first.op else { return Err(format!("{} is no linear", first.op.name())) };
        let part = |n: &Node| Ok::<_, String>(short(m.weight(n.args[1])?.0));
        for n in rest {
            if n.op != first.op {
                return Err(format!("{} and {} have different attributes", part(first)?, part(n)?));
            }
            if n.args.len() != first.args.len() {
                let has = |n: &Node| if n.args.len() > 2 { "a bias" } else { "no bias" };
                return Err(format!("{} has {}, {} {}", part(first)?, has(first), part(n)?, has(n)));
            }
        }
        let (mut weights, mut defs) = (vec![], vec![]);
        for operand in 1..first.args.len() {
            let values: Vec<ValueId> = linears.iter().map(|n| n.args[operand]).collect();
            let (name, def) = concat(m, &values)?;
            weights.push((name.clone(), Type::new(def.dtype, def.shape.iter().copied())));
            defs.push((name, def));
        }
        let widths = linears.iter().map(|n| Ok(m.weight(n.args[1])?.1.shape[0])).collect::<Result<_, String>>()?;
        Ok(Self { op: op.clone(), weights, defs, widths })
    }

    /// The linear of `x`.
    pub(super) fn apply<'g>(&self, g: &'g Builder<'g>, x: Val<'g>) -> Val<'g> {
        let weights = self.weights.iter().map(|(name, ty)| g.weight_value(name, ty.clone()));
        let args: Vec<Val<'g>> = std::iter::once(x).chain(weights).collect();
        let [y] = g.apply(self.op.clone(), &args);
        y
    }
}

/// `q_proj` of `model.layers.0.self_attn.q_proj.weight`.
fn short(name: &str) -> String {
    let path = name.strip_suffix(".weight").unwrap_or(name);
    path.rsplit('.').next().unwrap_or(path).to_string()
}

/// The weights one after the other along the rows, under their names joined by `+`.
fn concat(m: &Match<'_>, values: &[ValueId]) -> Result<(String, WeightDef), String> {
    let parts = values.iter().map(|v| m.weight(*v)).collect::<Result<Vec<_>, _>>()?;
    let [(first, like), ..] = parts[..] else { return Err("there are no weights".into()) };
    for ((name, def), v) in parts.iter().zip(values) {
        if def.dtype != like.dtype {
            return Err(format!("{} is {}, {} {}", short(first), like.dtype, short(name), def.dtype));
        }
        if m.users[v.index()] != 1 {
            return Err(format!("weight {} is used elsewhere", short(name)));
        }
        if name.contains('+') {
            return Err(format!("weight {name} is packed already"));
        }
    }
    let name = parts.iter().map(|(name, _)| *name).collect::<Vec<_>>().join("+");
    let mut shape = like.shape.clone();
    shape[0] = parts.iter().map(|(_, def)| def.shape[0]).sum();
    let recipe = Recipe::Concat(parts.iter().map(|(_, def)| def.recipe.clone()).collect());
    Ok((name, WeightDef { dtype: like.dtype, shape, recipe }))
}

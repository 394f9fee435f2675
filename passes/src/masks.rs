//! Attention masks.

use crate::{Contract, Pass, map_graphs};
use vlmc_ir::{
    Bindings, DType, Literal, Op,
    ops::{Attention, Mask, causal_mask, segment_mask},
    rewrite,
};

/// Attention whose mask is known by kind gets it as a `bool` tensor, which [`crate::clean::CSE`] then shares among layers.
pub(crate) const GIVEN: Pass =
    Pass::new("given-masks", "attention masks as tensors, for targets that know no kinds of mask", Contract::Exact, |_, program| {
        map_graphs(program, |graph| {
            rewrite(graph, |g, node, args| {
                let Op::Attention(op) = &node.op else { return None };
                let queries = args[0].dim(args[0].ty().rank() - 2);
                let given = match op.mask {
                    Mask::Full => return None,
                    // One row for all queries: runtimes of other people want as many as there are.
                    Mask::Given => {
                        let mut shape = args[3].ty().shape;
                        let row = shape.len().checked_sub(2)?;
                        if shape[row] == queries {
                            return None;
                        }
                        shape[row] = queries;
                        g.broadcast(args[3], shape)
                    }
                    Mask::Causal => causal_mask(g, args[3], &queries),
                    Mask::Segments => segment_mask(g, args[3]),
                };
                let op = Attention { mask: Mask::Given, ..op.clone() };
                Some(g.apply_op(op.into(), &[args[0], args[1], args[2], given]))
            })
            .map_err(Into::into)
        })
    });

/// Attention of graphs in which there may be no keys (no pictures to attend to) gets one more, which nobody sees: runtimes of
/// other people refuse to attend to nothing.
pub(crate) const ONE_KEY: Pass =
    Pass::new("one-key", "a hidden key where attention may have none, for targets that need one", Contract::Close, |_, program| {
        let least: Bindings = program.symbols.iter().map(|s| (s.name.as_str(), s.min)).collect();
        map_graphs(program, |graph| {
            rewrite(graph, |g, node, args| {
                let Op::Attention(op @ Attention { mask: Mask::Given, .. }) = &node.op else { return None };
                let axis = args[1].ty().rank() - 2;
                let t = args[1].dim(axis);
                let last = args[3].ty().rank() - 1;
                if t.eval(&least) != Ok(0) || args[3].dim(last) != t {
                    return None;
                }
                let hidden = if args[3].ty().dtype == DType::F32 { f64::from(f32::MIN) } else { 0.0 };
                let longer = [(args[1], axis, 0.0), (args[2], axis, 0.0), (args[3], last, hidden)].map(|(x, axis, fill)| {
                    let mut one = x.ty();
                    one.shape[axis] = 1.into();
                    g.concat(&[x, g.broadcast(g.literal(Literal::scalar(one.dtype, fill)), one.shape)], axis)
                });
                Some(g.apply_op(op.clone().into(), &[args[0], longer[0], longer[1], longer[2]]))
            })
            .map_err(Into::into)
        })
    });

//! Attention masks.

use crate::{Contract, Pass, map_graphs};
use vlmc_ir::{
    Op,
    ops::{Attention, Mask, causal_mask, segment_mask},
    rewrite,
};

/// Attention whose mask is known by kind gets it as a `bool` tensor, which [`crate::clean::CSE`] then shares among layers.
pub(crate) const GIVEN: Pass = Pass {
    name: "given-masks",
    summary: "attention masks as tensors, for targets that know no kinds of mask",
    contract: Contract::Exact,
    run: |_, program| {
        map_graphs(program, |graph| {
            rewrite(graph, |g, node, args| {
                let Op::Attention(Attention { scale, mask }) = &node.op else { return None };
                let queries = args[0].dim(args[0].ty().rank() - 2);
                let given = match mask {
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
                Some(vec![g.attention(args[0], args[1], args[2], *scale, Mask::Given, Some(given))])
            })
            .map_err(Into::into)
        })
    },
};

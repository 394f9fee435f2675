//! How states (the KV cache) are kept.

use crate::{PassError, map_graphs};
use vlmc_ir::{DType, Op, Program, rewrite};

/// The program with its states kept in `dtype`, see [`vlmc_ir::ops::Append`].
///
/// # Errors
/// States cannot be kept so.
pub fn keep_states(program: Program, dtype: DType) -> Result<Program, PassError> {
    map_graphs(program, |graph| {
        rewrite(graph, |g, node, args| {
            let Op::Append(append) = &node.op else { return None };
            let mut append = append.clone();
            append.keep = dtype;
            Some(g.apply_op(append.into(), args))
        })
        .map_err(PassError::from)
    })
}

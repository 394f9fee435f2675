//! hack
use ndarray::{ArrayD, IxDyn};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use vlmc_ir::{
    interp::{self, Array, Env},
    *,
};

struct Src(BTreeMap<String, (Vec<usize>, Vec<f32>)>);
impl WeightSource for Src {
    fn contains(&self, name: &str) -> Option<bool> {
        Some(self.0.contains_key(name))
    }
    fn resolve(&self, name: &str, shape: &[usize]) -> Result<DType, String> {
        let t = self.0.get(name).ok_or(format!("missing {name}"))?;
        if t.0 != shape {
            return Err(format!("{name} {:?} {shape:?}", t.0));
        }
        Ok(DType::BF16)
    }
}
fn load(p: &str) -> BTreeMap<String, Array> {
    let b = std::fs::read(p).unwrap();
    let st = SafeTensors::deserialize(&b).unwrap();
    st.tensors()
        .into_iter()
        .map(|(n, t)| {
            let sh = IxDyn(t.shape());
            let a = match t.dtype() {
                Dtype::F32 => Array::F32(
                    ArrayD::from_shape_vec(sh, t.data().chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()).unwrap(),
                ),
                Dtype::BF16 => Array::F32(
                    ArrayD::from_shape_vec(
                        sh,
                        t.data().chunks(2).map(|c| half::bf16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
                    )
                    .unwrap(),
                ),
                Dtype::I64 => Array::I64(
                    ArrayD::from_shape_vec(sh, t.data().chunks(8).map(|c| i64::from_le_bytes(c.try_into().unwrap())).collect()).unwrap(),
                ),
                _ => Array::Bool(ArrayD::from_shape_vec(sh, t.data().iter().map(|c| *c != 0).collect()).unwrap()),
            };
            (n, a)
        })
        .collect()
}

#[test]
fn goldens() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/qwen2-vl");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(format!("{dir}/config.json")).unwrap()).unwrap();
    let w = load(&format!("{dir}/model.safetensors"));
    let src = Src(w.iter().map(|(n, a)| (n.clone(), (a.shape().to_vec(), a.f32().unwrap().iter().copied().collect()))).collect());
    let arch = vlmc::arch::Architecture::of(&config).unwrap();
    let weights = Weights::new(&src);
    let (program, _) = arch.lower(&config, weights).unwrap();
    let program = verify(program).unwrap_or_else(|d| panic!("{}", d.iter().map(|d| d.to_string() + "\n").collect::<String>()));
    let ws = interp::weights(&program, &|n| Ok(src.0[n].1.clone())).unwrap();
    let g = load(&format!("{dir}/golden.safetensors"));
    for case in ["chat", "two", "video", "batch", "text"] {
        let get = |n: &str| g.get(&format!("{case}/{n}")).cloned();
        let ids = get("input_ids").unwrap();
        let (b, s) = (ids.shape()[0] as i64, ids.shape()[1] as i64);
        let px = get("pixel_values").or(get("pixel_values_videos"));
        let grid = get("image_grid_thw").or(get("video_grid_thw"));
        let mut sym = Bindings::default();
        for (n, v) in [("batch", b), ("seq", s), ("past", 0), ("scored", s), ("features", 0)] {
            sym.set(n, v);
        }
        let mut feats = Array::F32(ArrayD::zeros(IxDyn(&[0, 64])));
        let close = |a: &Array, b: &Array, what: &str| {
            let (a, b) = (a.f32().unwrap(), b.f32().unwrap());
            let (mut d, mut m) = (0f32, 0f32);
            assert_eq!(a.shape(), b.shape());
            for (x, y) in a.iter().zip(b) {
                d = d.max((x - y).abs());
                m = m.max(y.abs());
            }
            println!("{case} {what}: diff {d} max {m}");
            assert!(d <= 1e-4 * m.max(1.0));
        };
        if let (Some(px), Some(grid)) = (px, grid) {
            sym.set("image_tokens", px.shape()[0] as i64 / 4);
            sym.set("images", grid.shape()[0] as i64);
            let inputs = BTreeMap::from([("pixel_values".to_string(), px), ("image_grid_thw".to_string(), grid)]);
            let out = interp::run(&program.graphs[0], &Env { symbols: &sym, inputs: &inputs, weights: &ws }).unwrap();
            feats = out["image_features"].clone();
            close(&feats, &get("image_features").or(get("video_features")).unwrap(), "features");
            sym.set("features", feats.shape()[0] as i64);
        }
        let inputs = BTreeMap::from([("input_ids".to_string(), ids.clone()), ("image_features".to_string(), feats)]);
        let out = interp::run(&program.graphs[1], &Env { symbols: &sym, inputs: &inputs, weights: &ws }).unwrap();
        let pos =
            get("position_ids").unwrap_or_else(|| Array::I64(ArrayD::from_shape_fn(IxDyn(&[3, b as usize, s as usize]), |i| i[2] as i64)));
        let mut inputs = BTreeMap::from([
            ("inputs_embeds".to_string(), out["inputs_embeds"].clone()),
            ("position_ids".to_string(), pos),
            ("attention_mask".to_string(), get("attention_mask").unwrap()),
            ("logit_positions".to_string(), Array::I64(ArrayD::from_shape_fn(IxDyn(&[s as usize]), |i| i[0] as i64))),
        ]);
        for st in &program.graphs[2].states {
            inputs.insert(st.past_name.clone(), Array::F32(ArrayD::zeros(IxDyn(&[b as usize, 2, 0, 16]))));
        }
        let out = interp::run(&program.graphs[2], &Env { symbols: &sym, inputs: &inputs, weights: &ws }).unwrap();
        let want = get("logits").unwrap();
        let (l, want) = (out["logits"].f32().unwrap(), want.f32().unwrap());
        let from = l.shape()[1] - want.shape()[1];
        let l = l.slice_axis(ndarray::Axis(1), (from..).into()).to_owned();
        if case == "batch" {
            for r in 0..2 {
                let a = l.index_axis(ndarray::Axis(0), r).slice_axis(ndarray::Axis(0), (r as isize * 15..).into()).to_owned();
                let w = want.index_axis(ndarray::Axis(0), r).slice_axis(ndarray::Axis(0), (r as isize * 15..).into()).to_owned();
                close(&Array::F32(a), &Array::F32(w), "logits");
            }
        } else {
            close(&Array::F32(l), &Array::F32(want.clone()), "logits");
        }
    }
}

//! Products with a weight matrix in panels, and rows of a table.

#[cfg(target_arch = "x86_64")]
use crate::amx;
use crate::{
    Arithmetic, Isa, Kernels, Src, elementwise,
    isa::Task,
    lanes::{ASK_FAR, Lanes, N, prefetch_far},
    quantized::{Grid, Piece, Planes, Rounded},
};
use half::{bf16, f16};
use std::ops::Range;
use vlmc_artifact::{
    Scheme,
    program::{Layout, PANEL, Unary},
};

const _: () = assert!(PANEL == N, "a panel's row is one vector of lanes");

/// Real numbers as stored.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Floats<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    /// Bytes of whole panels.
    Quant(&'a [u8], Scheme),
}

impl<'a> Floats<'a> {
    /// A range of what [`Self::len`] counts.
    pub(crate) fn slice(self, range: Range<usize>) -> Floats<'a> {
        match self {
            Self::F32(a) => Floats::F32(&a[range]),
            Self::F16(a) => Floats::F16(&a[range]),
            Self::BF16(a) => Floats::BF16(&a[range]),
            Self::Quant(a, scheme) => Floats::Quant(&a[range], scheme),
        }
    }

    /// Elements, or bytes of panels.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(a) => a.len(),
            Self::F16(a) => a.len(),
            Self::BF16(a) => a.len(),
            Self::Quant(a, _) => a.len(),
        }
    }

    /// What [`Self::len`] must be of a panel of 16 rows of `k` columns.
    pub(crate) fn panel_len(&self, k: usize) -> Option<usize> {
        if let Self::Quant(_, scheme) = self { Grid::new(*scheme, k).panel_bytes() } else { k.checked_mul(PANEL) }
    }
}

/// A matrix `[n, k]` in panels.
#[derive(Clone, Copy, Debug)]
pub struct Panels<'a> {
    data: Floats<'a>,
    /// If its panels are split.
    pub(crate) planes: Option<Planes<'a>>,
    pub(crate) n: usize,
    k: usize,
}

impl<'a> Panels<'a> {
    /// In [`Layout::Panel16`]; `None` if `data` is not as long as `ceil(n / 16)` panels.
    pub fn new(data: Floats<'a>, n: usize, k: usize) -> Option<Self> {
        let len = n.div_ceil(PANEL).checked_mul(data.panel_len(k)?)?;
        (data.len() == len).then_some(Self { data, planes: None, n, k })
    }

    /// In a layout; `None` if `data` cannot lie so, or is not as long as `ceil(n / 16)` panels.
    pub fn in_layout(data: Floats<'a>, layout: Layout, n: usize, k: usize) -> Option<Self> {
        let panels = Self::new(data, n, k)?;
        match (layout, data) {
            (Layout::Panel16, _) => Some(panels),
            (Layout::Planes16, Floats::Quant(bytes, scheme)) => {
                Some(Self { planes: Some(Planes::new(Grid::new(scheme, k), bytes)?), ..panels })
            }
            _ => None,
        }
    }
}

/// A table `[n, width]` of rows.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    data: Floats<'a>,
    layout: Layout,
    n: usize,
    width: usize,
}

impl<'a> Table<'a> {
    /// `None` if `data` is not as long as the shape and layout need, or is quantized but not in panels.
    pub fn new(data: Floats<'a>, layout: Layout, n: usize, width: usize) -> Option<Self> {
        let len = match (layout, data) {
            (Layout::Planes16, Floats::Quant(bytes, scheme)) if Planes::new(Grid::new(scheme, width), bytes).is_none() => return None,
            (Layout::Panel16, _) | (Layout::Planes16, Floats::Quant(..)) => n.div_ceil(PANEL).checked_mul(data.panel_len(width)?)?,
            (Layout::Rows, Floats::Quant(..)) | (Layout::Planes16, _) => return None,
            (Layout::Rows, _) => n.checked_mul(width)?,
        };
        (data.len() == len).then_some(Self { data, layout, n, width })
    }

    /// Row `row < n`.
    fn row(&self, row: usize, out: &mut [f32]) {
        match self.data {
            Floats::F32(data) => self.floats(data, row, out),
            Floats::F16(data) => self.floats(data, row, out),
            Floats::BF16(data) => self.floats(data, row, out),
            Floats::Quant(bytes, scheme) => {
                let grid = Grid::new(scheme, self.width);
                if let Some(planes) = (self.layout == Layout::Planes16).then(|| Planes::new(grid, bytes)).flatten() {
                    return planes.row(row, out);
                }
                let len = grid.panel_bytes().unwrap_or(0);
                grid.row(&bytes[row / PANEL * len..][..len], row % PANEL, out);
            }
        }
    }

    fn floats<W: Element>(&self, data: &[W], row: usize, out: &mut [f32]) {
        match self.layout {
            Layout::Rows => out.iter_mut().zip(&data[row * self.width..]).for_each(|(o, v)| *o = v.to_f32()),
            _ => {
                let panel = &data[row / PANEL * PANEL * self.width..];
                out.iter_mut().enumerate().for_each(|(c, o)| *o = panel[c * PANEL + row % PANEL].to_f32());
            }
        }
    }
}

/// Rows `[m, k]` of a product.
pub enum Rows<'a> {
    /// As they are.
    Floats(&'a [f32]),
    /// As this product would round them.
    Rounded(Rounded),
}

impl<'a> From<&'a [f32]> for Rows<'a> {
    fn from(x: &'a [f32]) -> Self {
        Self::Floats(x)
    }
}

impl<'a> From<&'a Vec<f32>> for Rows<'a> {
    fn from(x: &'a Vec<f32>) -> Self {
        Self::Floats(x)
    }
}

/// An index outside of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadIndex {
    /// The index.
    pub index: i64,
    /// Length of the axis.
    pub len: usize,
}

/// Element types of weights and states.
pub(crate) trait Element: Copy + Sync {
    fn to_f32(self) -> f32;
    /// # Safety
    /// The CPU has the instruction set of `L`.
    unsafe fn lanes<L: Lanes>(a: &[Self; N]) -> L;
}

macro_rules! element {
    ($t:ty, $load:ident, $x:ident => $widen:expr) => {
        impl Element for $t {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                let $x = self;
                $widen
            }
            #[inline(always)]
            unsafe fn lanes<L: Lanes>(a: &[Self; N]) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::$load(a) }
            }
        }
    };
}
element!(f32, load, x => x);
element!(f16, load_f16, x => f16::to_f32(x));
element!(bf16, load_bf16, x => bf16::to_f32(x));
element!(i8, load_i8, x => f32::from(x));

/// Rows `[n, k]` to panels; missing rows of the last panel are zero.
pub fn pack_panels<T: Copy + Default>(rows: &[T], n: usize, k: usize) -> Vec<T> {
    assert_eq!(rows.len(), n * k, "rows must be [n, k]");
    let mut out = vec![T::default(); n.div_ceil(PANEL) * PANEL * k];
    pack_into(rows, k, &mut out);
    out
}

/// Rows of `k` elements to panels in `out`, of which missing rows are left as they are.
pub(crate) fn pack_into<T: Copy>(rows: &[T], k: usize, out: &mut [T]) {
    for (r, row) in rows.chunks_exact(k.max(1)).enumerate() {
        let panel = &mut out[r / PANEL * PANEL * k..];
        for (c, v) in row.iter().enumerate() {
            panel[c * PANEL + r % PANEL] = *v;
        }
    }
}

/// Rows of `x` that one pass over a panel serves: as many accumulators as there are registers for.
pub(crate) const ROWS: usize = 12;

/// `x [rows, k]` times one panel `[k, 16]` to `rows` vectors of 16. Rows of `x` are `x_stride` apart.
pub(crate) struct Tile<'a, W> {
    pub(crate) x: &'a [f32],
    pub(crate) x_stride: usize,
    pub(crate) k: usize,
    pub(crate) rows: usize,
    pub(crate) panel: &'a [W],
    pub(crate) out: &'a mut [[f32; N]; ROWS],
}

impl<W: Element> Tile<'_, W> {
    /// # Safety
    /// The CPU has the instruction set of `L`.
    #[inline(always)]
    pub(crate) unsafe fn compute<L: Lanes>(self) {
        assert!(self.rows <= ROWS && self.panel.len() == self.k * N);
        let need = if self.rows == 0 { 0 } else { (self.rows - 1) * self.x_stride + self.k };
        assert!(self.x.len() >= need);
        // SAFETY: the caller's promise.
        unsafe {
            match self.rows {
                0 => {}
                1 => self.block::<L, 1>(),
                2..=4 => self.block::<L, 4>(),
                5..=8 => self.block::<L, 8>(),
                _ => self.block::<L, ROWS>(),
            }
        }
    }

    /// Up to `M` rows; rows beyond the last one repeat it. Each is summed in one order, whatever their number.
    #[inline(always)]
    unsafe fn block<L: Lanes, const M: usize>(self) {
        let rows: [&[f32]; M] = std::array::from_fn(|r| &self.x[r.min(self.rows - 1) * self.x_stride..][..self.k]);
        let (panel, _) = self.panel.as_chunks::<N>();
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [L::splat(0.0); M];
            let far = M == 1 && *ASK_FAR;
            for (c, w) in panel.iter().enumerate().take(self.k) {
                if far {
                    prefetch_far(w);
                }
                let w = W::lanes::<L>(w);
                for r in 0..M {
                    // SAFETY: `c < k`, the length of each row.
                    acc[r] = w.mul_add(L::splat(*rows[r].get_unchecked(c)), acc[r]);
                }
            }
            for (acc, out) in acc.iter().zip(self.out.iter_mut()).take(self.rows) {
                acc.store(out);
            }
        }
    }
}

struct Product<'a, W> {
    x: &'a [f32],
    k: usize,
    panels: &'a [W],
    bias: &'a [f32],
    act: Option<Unary>,
    out: OutColumns,
    m: usize,
    first_panel: usize,
}

/// The output `[m, n]`, of which threads have different parts: columns of products, runs of heads of attention.
#[derive(Clone, Copy)]
pub(crate) struct OutColumns {
    data: *mut f32,
    len: usize,
    n: usize,
}

// SAFETY: what threads read and write of it is disjoint, as callers of its unsafe functions promise.
unsafe impl Send for OutColumns {}
// SAFETY: as above.
unsafe impl Sync for OutColumns {}

impl OutColumns {
    /// Of `out [m, n]`.
    pub(crate) fn new(out: &mut [f32], n: usize) -> Self {
        Self { data: out.as_mut_ptr(), len: out.len(), n }
    }

    /// Rows from `first` on, which there are.
    pub(crate) fn rows_from(self, first: usize) -> Self {
        Self { data: self.data.wrapping_add(first * self.n), len: self.len - first * self.n, n: self.n }
    }

    /// Elements of a row.
    #[inline(always)]
    pub(crate) fn columns(self) -> usize {
        self.n
    }

    /// Place of `width` elements from `column` on, which are there.
    #[inline(always)]
    pub(crate) fn place(self, row: usize, column: usize, width: usize) -> *mut f32 {
        let at = row * self.n + column;
        assert!(column + width <= self.n && at + width <= self.len);
        self.data.wrapping_add(at)
    }

    /// Elements from `column` on, zeros after the last column.
    ///
    /// # Safety
    /// No other thread uses these elements.
    #[inline(always)]
    pub(crate) unsafe fn read(self, row: usize, column: usize) -> [f32; N] {
        let width = N.min(self.n - column);
        let from = self.place(row, column, width);
        // SAFETY: in bounds, as `place` says; no other thread has these columns.
        unsafe {
            if width == N {
                return from.cast::<[f32; N]>().read_unaligned();
            }
            std::array::from_fn(|i| if i < width { from.add(i).read() } else { 0.0 })
        }
    }

    /// Writes these elements from `column` on.
    ///
    /// # Safety
    /// As [`Self::read`].
    #[inline(always)]
    pub(crate) unsafe fn write_part(self, row: usize, column: usize, values: &[f32]) {
        let to = self.place(row, column, values.len());
        // SAFETY: in bounds, as `place` says; no other thread has these columns.
        unsafe { to.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }

    /// Writes elements from `column` on, as many as there are columns.
    ///
    /// # Safety
    /// As [`Self::read`].
    #[inline(always)]
    pub(crate) unsafe fn write(self, row: usize, column: usize, values: &[f32; N]) {
        let width = N.min(self.n - column);
        // A length that the compiler knows, mostly.
        let values = if width < N { &values[..width] } else { values };
        // SAFETY: the caller's promise.
        unsafe { self.write_part(row, column, values) };
    }

    /// Elements of `bias [n]`, which may be empty, from `column` on; zeros where there are none.
    #[inline(always)]
    pub(crate) fn bias(self, bias: &[f32], column: usize) -> [f32; N] {
        let mut values = [0.0; N];
        if let Some(bias) = bias.get(column..self.n.min(column + N)) {
            values[..bias.len()].copy_from_slice(bias);
        }
        values
    }
}

impl<W: Element> Task for Product<'_, W> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut tile = [[0.0; N]; ROWS];
        for (p, panel) in self.panels.chunks_exact((self.k * N).max(1)).enumerate() {
            let column = (self.first_panel + p) * N;
            let bias = self.out.bias(self.bias, column);
            for row in (0..self.m).step_by(ROWS) {
                let rows = ROWS.min(self.m - row);
                // SAFETY: the caller's promise.
                unsafe { Tile { x: &self.x[row * self.k..], x_stride: self.k, k: self.k, rows, panel, out: &mut tile }.compute::<L>() };
                for values in &mut tile[..rows] {
                    values.iter_mut().zip(&bias).for_each(|(v, b)| *v += b);
                }
                if let Some(act) = self.act {
                    // SAFETY: the caller's promise.
                    unsafe { elementwise::map::<L>(act, tile[..rows].as_flattened_mut()) };
                }
                for (r, values) in tile.iter().enumerate().take(rows) {
                    // SAFETY: `Kernels::linear` gives each panel to one thread.
                    unsafe { self.out.write(row + r, column, values) };
                }
            }
        }
    }
}

/// What becomes of a product `[m, n]`.
#[derive(Clone, Copy)]
enum Then {
    /// A function of each element.
    Apply(Option<Unary>),
    /// It stays, and [`Kernels::gated`] of it goes to `[m, n / 2]`; `n` is a multiple of two panels.
    Gate(Unary, OutColumns),
}

impl Then {
    fn act(self) -> Option<Unary> {
        if let Self::Apply(act) = self { act } else { None }
    }
}

/// [`Then::Gate`] of some columns of the first half, and of those of the second.
struct Gates {
    f: Unary,
    product: OutColumns,
    out: OutColumns,
    m: usize,
    columns: Range<usize>,
}

impl Task for Gates {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { f, product, out, m, columns } = self;
        for row in 0..m {
            for column in columns.clone().step_by(N) {
                // SAFETY: the caller's promise, and `Kernels::pieces_then` gives these columns to one thread.
                unsafe {
                    let ([a, b], mut gated) = ([column, out.n + column].map(|column| product.read(row, column)), [0.0; N]);
                    elementwise::Gate { f, a: &a, b: &b, out: &mut gated }.run::<L>();
                    out.write(row, column, &gated);
                }
            }
        }
    }
}

/// Whether rows that are rounded are multiplied in tiles, which codes of 3 bits are not brought to.
#[cfg(target_arch = "x86_64")]
fn in_tiles(isa: Isa, scheme: Scheme, rows: usize) -> bool {
    isa == Isa::Amx && rows >= amx::MIN_ROWS && scheme.bits != 3
}

impl Isa {
    /// What [`Kernels::linear`] multiplies `rows` rows of `k` columns in, with weights of `scheme` if they are quantized.
    pub fn linear_arithmetic(self, scheme: Option<Scheme>, dynamic: bool, rows: usize, k: usize) -> Arithmetic {
        match scheme {
            #[cfg(target_arch = "x86_64")]
            Some(scheme) if dynamic && in_tiles(self, scheme, rows) && !amx::in_integers(Grid::new(scheme, k)) => Arithmetic::Bf16,
            Some(_) if dynamic => Arithmetic::Int8,
            _ => Arithmetic::F32,
        }
    }
}

impl Kernels {
    /// `x [m, k]` times `w [n, k]` transposed, plus `bias [n]` and then through `act` if there are such, to `out [m, n]`. With
    /// `dynamic`, `x` is rounded to 8 bits first, as [`vlmc_artifact::program::Kernel::Linear`] says. Of many rows, where small groups
    /// would take as long to bring together as to multiply, `x` and numbers of 3 or 4 bits are rounded to 8 bits with a scale for 256
    /// columns, or with AMX (4 bits) to bf16.
    ///
    /// # Panics
    /// If the lengths do not fit, or `dynamic` is asked of weights that are not quantized.
    pub fn linear<'a>(
        &self,
        x: impl Into<Rows<'a>>,
        w: &Panels<'_>,
        bias: Option<&[f32]>,
        act: Option<Unary>,
        dynamic: bool,
        out: &mut [f32],
    ) {
        self.product(x.into(), w, bias, Then::Apply(act), dynamic, out);
    }

    /// How [`Self::linear`] rounds `m` rows, if these are many and are rounded to 8 bits.
    pub(crate) fn rounding(&self, w: &Panels<'_>, m: usize) -> Option<Grid> {
        let Floats::Quant(_, scheme) = w.data else { return None };
        #[cfg(target_arch = "x86_64")]
        if in_tiles(self.isa, scheme, m) {
            return None;
        }
        Grid::new(scheme, w.k).wide(m)
    }

    /// [`Self::linear`] of `w [2 n, k]` to `product [m, 2 n]`, and [`Self::gated`] of that to `out [m, n]`. What a thread has multiplied
    /// is in its cache, so of few rows it takes the same rows of both halves of `w` and multiplies their results too. (Of many, `x` is there
    /// and would have to leave.)
    ///
    /// # Panics
    /// As these.
    pub fn gated_linear<'a>(
        &self,
        x: impl Into<Rows<'a>>,
        w: &Panels<'_>,
        bias: Option<&[f32]>,
        f: Unary,
        dynamic: bool,
        [product, out]: [&mut [f32]; 2],
    ) {
        assert!(f != Unary::Not, "'not' is a function of booleans");
        assert!(product.len() == 2 * out.len(), "product must be [m, 2 n], out [m, n]");
        let n = w.n / 2;
        if w.n.is_multiple_of(2 * N) && w.k > 0 && w.planes.is_none() && product.len() <= ROWS * w.n {
            self.product(x.into(), w, bias, Then::Gate(f, OutColumns::new(out, n)), dynamic, product);
        } else {
            self.linear(x, w, bias, None, dynamic, product);
            self.gated(f, product, n, out);
        }
    }

    /// [`Self::linear`], and what becomes of the product.
    fn product(&self, x: Rows<'_>, w: &Panels<'_>, bias: Option<&[f32]>, then: Then, dynamic: bool, out: &mut [f32]) {
        let (n, k) = (w.n, w.k);
        assert!(!dynamic || matches!(w.data, Floats::Quant(..)), "x is rounded for quantized weights only");
        if n == 0 || out.is_empty() {
            assert!(out.is_empty(), "out must be [m, n]");
            return;
        }
        let m = out.len() / n;
        assert!(out.len() == m * n, "out must be [m, n]");
        let (x, rounded) = match x {
            Rows::Floats(x) => (x, None),
            Rows::Rounded(x) => (&[][..], Some(x)),
        };
        match &rounded {
            None => assert!(x.len() == m * k, "x must be [m, k]"),
            Some(x) => assert!(dynamic && x.m == m && self.rounding(w, m) == Some(x.grid), "x must be rounded for this product"),
        }
        let bias = bias.unwrap_or(&[]);
        assert!(bias.is_empty() || bias.len() == n, "bias must be [n]");
        if k == 0 {
            out.chunks_exact_mut(n).for_each(|row| if bias.is_empty() { row.fill(0.0) } else { row.copy_from_slice(bias) });
            if let Some(act) = then.act() {
                self.unary(act, Src::InPlace, out);
            }
            return;
        }
        let columns = OutColumns::new(out, n);
        match w.data {
            Floats::F32(panels) => self.float_product(x, panels, k, bias, then, columns),
            Floats::F16(panels) => self.float_product(x, panels, k, bias, then, columns),
            Floats::BF16(panels) => self.float_product(x, panels, k, bias, then, columns),
            Floats::Quant(panels, scheme) => {
                if let Some(planes) = w.planes.filter(|_| m == 1 && dynamic && then.act().is_none()) {
                    return self.row_product(x, planes, bias, false, out);
                }
                let (grid, act) = (Grid::new(scheme, k), then.act().map(|act| (self.isa, act)));
                let pieces = |product: &(dyn Fn(Piece<'_>) + Sync)| {
                    let product =
                        |first_panel: usize, panels: &[u8]| product(Piece { grid, panels, first_panel, bias, act, out: columns, m });
                    match w.planes {
                        None => self.pieces_then(panels, m * n * k, m, columns, then, product),
                        Some(planes) => {
                            let count = |upper: &[u8]| upper.len() * n.div_ceil(N) / planes.upper.len();
                            self.panel_pieces(planes.upper, m * n * k, n, m, |first, upper| {
                                planes.joined(self, first, count(upper), product)
                            });
                        }
                    }
                };
                if dynamic {
                    let words = match rounded {
                        Some(x) => x.words,
                        None => {
                            let mut words = self.take_scratch();
                            #[cfg(target_arch = "x86_64")]
                            if in_tiles(self.isa, scheme, m) {
                                self.tile_product(x, m, grid, &mut words, pieces);
                                self.give_scratch(words);
                                return;
                            }
                            self.round_rows(x, m, grid, &mut words);
                            words
                        }
                    };
                    if w.planes.is_none() && grid.lies(m) {
                        self.split_product(&words, Piece { grid, panels, first_panel: 0, bias, act, out: columns, m });
                    } else {
                        pieces(&|piece| self.rounded_product(&words, piece));
                    }
                    self.give_scratch(words);
                } else {
                    pieces(&|piece| self.widened_product(x, piece));
                }
            }
        }
    }

    fn float_product<W: Element>(&self, x: &[f32], panels: &[W], k: usize, bias: &[f32], then: Then, out: OutColumns) {
        let m = out.len / out.n;
        self.pieces_then(panels, m * out.n * k, m, out, then, |first_panel, panels| {
            self.isa.run(Product { x, k, panels, bias, act: then.act(), out, m, first_panel });
        });
    }

    /// Splits the panels of `n` rows among threads: calls `job` with each piece and the number of its first panel. Pieces begin at
    /// every fourth panel.
    pub(crate) fn panel_pieces<W: Sync>(&self, panels: &[W], work: usize, n: usize, m: usize, job: impl Fn(usize, &[W]) + Sync) {
        let count = n.div_ceil(N);
        let len = panels.len() / count;
        self.ranges(count, work, m, |range| job(range.start, &panels[range.start * len..range.end * len]));
    }

    /// [`Self::panel_pieces`] of a product that is written to `out`. If that is gated, a piece of the first half comes with the same of the
    /// second, and then with what the gates make of both.
    fn pieces_then<W: Sync>(&self, panels: &[W], work: usize, m: usize, out: OutColumns, then: Then, job: impl Fn(usize, &[W]) + Sync) {
        let Then::Gate(f, gated) = then else { return self.panel_pieces(panels, work, out.n, m, job) };
        let half = out.n / N / 2;
        let len = panels.len() / (2 * half);
        self.ranges(half, work, m, |range| {
            for panel in [0, half] {
                let Range { start, end } = panel + range.start..panel + range.end;
                job(start, &panels[start * len..end * len]);
            }
            self.isa.run(Gates { f, product: out, out: gated, m, columns: range.start * N..range.end * N });
        });
    }

    /// Splits `count` panels among threads.
    fn ranges(&self, count: usize, work: usize, m: usize, job: impl Fn(Range<usize>) + Sync) {
        // Large contiguous pieces read memory best; with many rows, many small ones end at about the same time.
        let step = match self.pool.threads() {
            _ if work < 1 << 16 => count,
            threads if m > ROWS => count / (32 * threads) / 4 * 4,
            threads => count.div_ceil(threads).next_multiple_of(4),
        };
        let step = step.max(4);
        self.pool.run(count.div_ceil(step), |piece| job(piece * step..count.min((piece + 1) * step)));
    }

    /// `a [batches, m, k]` times `b [batches, k, n]` to `out [batches, m, n]`; batch `i` reads `a` at `base(i).0` and `b` at
    /// `base(i).1`. For products of activations, which are rare and small.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn matmul(&self, a: &[f32], b: &[f32], base: impl Fn(usize) -> (usize, usize) + Sync, [m, k, n]: [usize; 3], out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        self.pool.chunks(out, n, |row, out| {
            let (batch, row) = (row / m, row % m);
            let (a_base, b_base) = base(batch);
            let a = &a[a_base + row * k..][..k];
            out.fill(0.0);
            for (i, a) in a.iter().enumerate() {
                let b = &b[b_base + i * n..][..n];
                out.iter_mut().zip(b).for_each(|(o, b)| *o += a * b);
            }
        });
    }

    /// Rows `ids` of a table to `out [ids, width]`.
    ///
    /// # Errors
    /// An id outside of the table; `out` is incomplete then.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn embedding(&self, table: &Table<'_>, ids: &[i64], out: &mut [f32]) -> Result<(), BadIndex> {
        assert_eq!(out.len(), ids.len() * table.width, "out must be [ids, width]");
        let width = table.width;
        for (i, id) in ids.iter().enumerate() {
            let row = usize::try_from(*id).ok().filter(|r| *r < table.n).ok_or(BadIndex { index: *id, len: table.n })?;
            let out = &mut out[i * width..(i + 1) * width];
            table.row(row, out);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vlmc_artifact::quant::{self, Codes, Method};

    fn naive(x: &[f32], w: &[f32], bias: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
        let dot = |r: usize, c: usize| (0..k).map(|i| f64::from(x[r * k + i]) * f64::from(w[c * k + i])).sum::<f64>() as f32;
        (0..m * n).map(|i| dot(i / n, i % n) + bias.get(i % n).unwrap_or(&0.0)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn linear_is_a_matrix_product(m in 0usize..30, n in 0usize..70, k in 0usize..40, threads in 1usize..4, with_bias: bool, seed: u32) {
            let mut state = seed;
            let mut next = || { state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); (state >> 8) as f32 / (1 << 24) as f32 - 0.5 };
            let mut vector = |n: usize| (0..n).map(|_| next()).collect::<Vec<f32>>();
            let (x, w, b) = (vector(m * k), vector(n * k), vector(if with_bias { n } else { 0 }));
            let bias = with_bias.then_some(b.as_slice());
            let b16: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let h16: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
            let widened: [Vec<f32>; 3] = [w.clone(), h16.iter().map(|v| v.to_f32()).collect(), b16.iter().map(|v| v.to_f32()).collect()];
            let (pw, ph, pb) = (pack_panels(&w, n, k), pack_panels(&h16, n, k), pack_panels(&b16, n, k));
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let kernels = Kernels::with_isa(threads, isa).unwrap();
                for (data, w) in [Floats::F32(&pw), Floats::F16(&ph), Floats::BF16(&pb)].into_iter().zip(&widened) {
                    let mut out = vec![f32::NAN; m * n];
                    kernels.linear(&x, &Panels::new(data, n, k).unwrap(), bias, None, false, &mut out);
                    for (a, e) in out.iter().zip(naive(&x, w, &b, m, n, k)) {
                        prop_assert!((a - e).abs() <= 1e-5 * (1.0 + e.abs()), "{isa:?} {a} {e}");
                    }
                    let mut alone = vec![f32::NAN; m * n];
                    Kernels::with_isa(1, isa).unwrap().linear(&x, &Panels::new(data, n, k).unwrap(), bias, None, false, &mut alone);
                    prop_assert_eq!(&out, &alone);
                    // With an activation, what the activation makes of the result.
                    for act in [Unary::Gelu, Unary::Tanh] {
                        let (mut fused, mut after) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
                        kernels.linear(&x, &Panels::new(data, n, k).unwrap(), bias, Some(act), false, &mut fused);
                        kernels.unary(act, Src::Slice(&out), &mut after);
                        prop_assert_eq!(&fused, &after);
                    }
                }
            }
        }
    }

    /// Halves that are whole panels, and others; few rows and many; panels in floats, in codes and in planes.
    #[test]
    fn gated_products_are_products_gated() {
        let mut state = 7u32;
        let mut floats = |n: usize| {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            };
            (0..n).map(|_| next()).collect::<Vec<f32>>()
        };
        let k = 64;
        for (m, n) in [(1, 16), (1, 400), (5, 48), (130, 80), (3, 7), (0, 16)] {
            let (x, w, bias) = (floats(m * k), floats(2 * n * k), floats(2 * n));
            let codes = Codes::of(&w, k, Scheme::INT4, Method::Round);
            let floats = pack_panels(&w, 2 * n, k);
            let bytes = quant::pack_panels(&codes, k, Scheme::INT4);
            let planes = quant::split_planes(&bytes, k, Scheme::INT4).concat();
            let quantized = |bytes, layout| Panels::in_layout(Floats::Quant(bytes, Scheme::INT4), layout, 2 * n, k).unwrap();
            let matrices = [
                (Panels::new(Floats::F32(&floats), 2 * n, k).unwrap(), false),
                (quantized(&bytes, Layout::Panel16), true),
                (quantized(&bytes, Layout::Panel16), false),
                (quantized(&planes, Layout::Planes16), true),
            ];
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                for threads in 1..4 {
                    let kernels = Kernels::with_isa(threads, isa).unwrap();
                    for (w, dynamic) in &matrices {
                        let (mut product, mut gated) = (vec![f32::NAN; 2 * m * n], vec![f32::NAN; m * n]);
                        kernels.linear(&x, w, Some(&bias), None, *dynamic, &mut product);
                        kernels.gated(Unary::Silu, &product, n, &mut gated);
                        let (mut whole, mut out) = (vec![f32::NAN; 2 * m * n], vec![f32::NAN; m * n]);
                        kernels.gated_linear(&x, w, Some(&bias), Unary::Silu, *dynamic, [&mut whole, &mut out]);
                        assert_eq!((whole, out), (product, gated), "{isa:?}, {threads} threads, {m} rows, {n} columns");
                    }
                }
            }
        }
    }

    #[test]
    fn matmul_multiplies_each_batch() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
        let mut out = [0.0; 8];
        Kernels::new(2).matmul(&a, &b, |_| (0, 0), [2, 2, 2], &mut out);
        assert_eq!(out, [19.0, 22.0, 43.0, 50.0, 19.0, 22.0, 43.0, 50.0]);
    }

    #[test]
    fn embedding_reads_rows_of_both_layouts_and_refuses_bad_ids() {
        let (n, width) = (19, 5);
        let table: Vec<f32> = (0..n * width).map(|v| v as f32).collect();
        let packed = pack_panels(&table, n, width);
        let k = Kernels::new(1);
        for (data, layout) in [(&table, Layout::Rows), (&packed, Layout::Panel16)] {
            let t = Table::new(Floats::F32(data), layout, n, width).unwrap();
            let mut out = vec![0.0; 2 * width];
            k.embedding(&t, &[18, 3], &mut out).unwrap();
            assert_eq!(out[..width], table[18 * width..19 * width]);
            assert_eq!(out[width..], table[3 * width..4 * width]);
            for bad in [-1, 19, i64::MAX] {
                assert_eq!(k.embedding(&t, &[0, bad], &mut out), Err(BadIndex { index: bad, len: n }));
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(Panels::new(Floats::F32(&[0.0; 31]), 2, 2).is_none());
        assert!(Panels::new(Floats::F32(&[0.0; 32]), 2, 2).is_some());
        assert!(Panels::new(Floats::F32(&[]), usize::MAX, usize::MAX).is_none());
        assert!(Table::new(Floats::F32(&[0.0; 5]), Layout::Rows, 2, 3).is_none());
    }
}

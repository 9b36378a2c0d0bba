//! Primitives at every level against f64, within bounds computed from the data.
#![allow(clippy::float_cmp, reason = "exact values are meant")]

use half::{bf16, f16};
use proptest::prelude::*;
use std::cell::RefCell;
use subquad::dtype::{Element, Float};
use subquad::index::KeyPlaces;
use subquad::math::exp::exp2;
use subquad::math::online_softmax::{Column, Exponential, log_sum_exp, probabilities, step};
use subquad::math::tanh::tanh_each;
use subquad::math::tile::{HeadRows, TileKernel, VectorTiles};
use subquad::simd::{Isa, Level, SimdElement, Task, Vector, VectorKernel};
use subquad::tensor::Tensor;

/// Units in the last place of 1.
const EPS_F32: f64 = f32::EPSILON as f64;

fn f64s<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_acc().to_f64()).collect()
}

fn run(level: Level, task: &impl Task) {
    level.run(task, 0);
}

struct Exp2<'a, T: SimdElement>(&'a [T::Acc], &'a RefCell<Vec<T::Acc>>);
impl<T: SimdElement> Task for Exp2<'_, T> {
    const MULTIPLIES_BF16: bool = true;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        let lanes = T::V::<I>::LANES;
        let mut out = vec![T::Acc::ZERO; self.0.len()];
        for (x, y) in self.0.chunks_exact(lanes).zip(out.chunks_exact_mut(lanes)) {
            exp2::<T, I>(T::V::<I>::load(x)).store(y);
        }
        *self.1.borrow_mut() = out;
    }
}

fn check_exp2<T: SimdElement>(relative: f64) {
    let mut x: Vec<T::Acc> = (0..16 * 64).map(|i| T::Acc::from_f64(-f64::from(i) * 0.117)).collect();
    let end = x.len();
    x[end - 3..].copy_from_slice(&[f64::NEG_INFINITY, f64::NAN, -1e30].map(T::Acc::from_f64));
    for level in Level::available() {
        let out = RefCell::new(vec![]);
        run(level, &Exp2::<T>(&x, &out));
        let out = out.into_inner();
        for (&x, &y) in x[..end - 3].iter().zip(&out) {
            let want = x.to_f64().exp2();
            // Results below the smallest normal number may be flushed.
            let floor = if size_of::<T::Acc>() == 4 { f64::from(f32::MIN_POSITIVE) } else { f64::MIN_POSITIVE };
            assert!((y.to_f64() - want).abs() <= relative * want + floor, "2^{x:?} = {y:?} at {}", level.name());
        }
        assert_eq!(out[0].to_f64(), 1.0, "2^0 at {}", level.name());
        assert_eq!(out[end - 3], T::Acc::ZERO, "-inf at {}", level.name());
        assert!(out[end - 2].to_f64().is_nan(), "NaN at {}", level.name());
        assert_eq!(out[end - 1], T::Acc::ZERO, "far below at {}", level.name());
    }
}

#[test]
fn exp2_is_accurate_for_each_type() {
    check_exp2::<f32>(1.1e-7 + 2.0 * EPS_F32);
    check_exp2::<f16>(2.9e-6 + 2.0 * EPS_F32);
    check_exp2::<bf16>(2.9e-6 + 2.0 * EPS_F32);
    check_exp2::<f64>(1e-15);
}

struct Tanh<'a, T: SimdElement>(&'a [T::Acc], &'a RefCell<Vec<T::Acc>>);
impl<T: SimdElement> Task for Tanh<'_, T> {
    const MULTIPLIES_BF16: bool = true;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        let mut out = vec![T::Acc::ZERO; self.0.len()];
        let lanes = T::V::<I>::LANES;
        // Each number beside another one in the same lane, and those that are left alone.
        for (x, y) in self.0.chunks(3 * lanes).zip(out.chunks_mut(3 * lanes)) {
            let load = |i: usize| T::V::<I>::load(&x[(i * lanes).min(x.len() - lanes)..]);
            for (i, found) in tanh_each::<T, I, 3>([load(0), load(1), load(2)]).into_iter().enumerate() {
                found.store(&mut y[(i * lanes).min(x.len() - lanes)..]);
            }
        }
        *self.1.borrow_mut() = out;
    }
}

fn check_tanh<T: SimdElement>(relative: f64) {
    let mut x: Vec<T::Acc> = (0..20_000).map(|i| T::Acc::from_f64((f64::from(i) - 10_000.0) * 1.1e-3)).collect();
    x.extend([1e-30, -1e-12, 1e-4, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 50.0, -8.9].map(T::Acc::from_f64));
    x.extend([T::Acc::ZERO; 8]);
    for level in Level::available() {
        let out = RefCell::new(vec![]);
        run(level, &Tanh::<T>(&x, &out));
        for (x, y) in x.iter().zip(out.into_inner()) {
            let (want, y) = (x.to_f64().tanh(), y.to_f64());
            let same = want.is_nan() && y.is_nan();
            assert!(same || (y - want).abs() <= relative * want.abs(), "tanh {x:?} is {want}, got {y} at {}", level.name());
        }
    }
}

#[test]
fn tanh_is_accurate() {
    check_tanh::<f32>(6.0 * EPS_F32);
    check_tanh::<bf16>(6.0 * EPS_F32);
    check_tanh::<f64>(1e-15);
}

struct RoundTrip<'a, T: SimdElement>(&'a [T::Acc], &'a RefCell<Vec<T>>);
impl<T: SimdElement> Task for RoundTrip<'_, T> {
    const MULTIPLIES_BF16: bool = true;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        let lanes = T::V::<I>::LANES;
        let mut out = vec![T::zeroed(); self.0.len()];
        for (x, y) in self.0.chunks_exact(lanes).zip(out.chunks_exact_mut(lanes)) {
            T::store::<I>(T::V::<I>::load(x), y);
        }
        let widened = RefCell::new(vec![T::Acc::ZERO; out.len()]);
        for (x, y) in out.chunks_exact(lanes).zip(widened.borrow_mut().chunks_exact_mut(lanes)) {
            T::load::<I>(x).store(y);
        }
        for (x, y) in out.iter().zip(widened.into_inner()) {
            assert!(x.to_acc() == y || x.to_acc().to_f64().is_nan() && y.to_f64().is_nan(), "loads widen exactly");
        }
        *self.1.borrow_mut() = out;
    }
}

fn check_rounding<T: SimdElement>() {
    let mut x: Vec<T::Acc> = (0..4096u32).map(|i| T::Acc::from_f64((f64::from(i) - 2048.0) * 1.000_37e-3)).collect();
    x.extend([0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 65504.0, 65520.0, 1e38].map(T::Acc::from_f64));
    x.extend([1e-40, 6e-8, 3e-8, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 3.5e38, -3.5e38, 1e-30].map(T::Acc::from_f64));
    for level in Level::available() {
        let out = RefCell::new(vec![]);
        run(level, &RoundTrip::<T>(&x, &out));
        for (&x, y) in x.iter().zip(out.into_inner()) {
            let want = T::from_acc(x);
            let same = bytemuck::bytes_of(&want) == bytemuck::bytes_of(&y);
            let nan = want.to_acc().to_f64().is_nan() && y.to_acc().to_f64().is_nan();
            assert!(same || nan, "{x:?} rounds to {y:?}, not {want:?}, at {}", level.name());
        }
    }
}

#[test]
fn stores_round_to_nearest_even() {
    check_rounding::<f32>();
    check_rounding::<f64>();
    check_rounding::<f16>();
    check_rounding::<bf16>();
}

struct Transpose;
impl Task for Transpose {
    const MULTIPLIES_BF16: bool = true;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        transposed::<I::F32>();
        transposed::<I::F64>();
    }
}
#[inline(always)]
fn transposed<V: Vector>() {
    let mut block = V::zero_block();
    for (i, row) in block.as_mut().iter_mut().enumerate() {
        let values: Vec<V::Elem> = (0..V::LANES).map(|j| V::Elem::from_f64((i * 100 + j) as f64)).collect();
        *row = V::load(&values);
    }
    for (j, column) in V::transpose(block).as_ref().iter().enumerate() {
        let mut values = vec![V::Elem::ZERO; V::LANES];
        column.store(&mut values);
        for (i, value) in values.iter().enumerate() {
            assert_eq!(*value, V::Elem::from_f64((i * 100 + j) as f64));
        }
    }
}

#[test]
fn transposes_move_every_lane() {
    for level in Level::available() {
        run(level, &Transpose);
    }
}

struct Lanewise;
impl Task for Lanewise {
    const MULTIPLIES_BF16: bool = true;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        let nan = I::F32::splat(f32::NAN);
        let [one, two] = [1.0, 2.0].map(I::F32::splat);
        let first = |v: I::F32| {
            let mut lanes = [0f32; 16];
            v.store(&mut lanes);
            lanes[0]
        };
        assert_eq!(first(nan.max(one)), 1.0, "the second operand where either is NaN");
        assert!(first(one.max(nan)).is_nan());
        assert_eq!(first(two.select_gt(one, one, two)), 1.0);
        assert_eq!(first(nan.select_gt(one, one, two)), 2.0, "a NaN is not greater");
        assert_eq!(first(one.mul_add(two, two)), 4.0);
        assert_eq!(first(one.sub(two)), -1.0);
    }
}

#[test]
fn nan_goes_where_the_contract_says() {
    for level in Level::available() {
        run(level, &Lanewise);
    }
}

/// Scores, accumulator, and the panel's width.
type Results<A> = (Vec<A>, Vec<A>, usize);

/// Both products of one panel and block.
struct Products<'a, T: SimdElement> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    dims: (usize, usize),
    out: &'a RefCell<Results<T::Acc>>,
}
impl<T: SimdElement> Task for Products<'_, T> {
    const MULTIPLIES_BF16: bool = true;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        self.products::<I, VectorTiles<I>>();
    }
}

impl<T: SimdElement> Products<'_, T> {
    #[inline(always)]
    fn products<I: Isa, K: TileKernel<T>>(&self) {
        let (d, dv) = self.dims;
        let panel = K::PANEL;
        let vectors = K::VECTORS;
        let queries = self.q.len() / d;
        let count = self.k.len() / d;
        let block = |data, width| HeadRows {
            tensor: Tensor::contiguous("rows", data, [1, count, 1, width]).unwrap(),
            places: KeyPlaces { pages: None, batch: 0, first: 0 },
            head: 0,
            first: 0,
            count,
        };
        let mut packed_q = vec![T::Acc::ZERO; K::queries_len(d)];
        let mut packed_k = vec![T::Acc::from_f64(f64::NAN); K::keys_len(count, d)];
        let mut packed_v = vec![T::Acc::from_f64(f64::NAN); K::values_len(count, dv)];
        let rows: Vec<&[T]> = self.q.chunks(d).take(panel).collect();
        K::pack_queries(&rows, d, &mut packed_q);
        K::pack_keys(&block(self.k, d), d, &mut packed_k);
        assert!(K::pack_values(&block(self.v, dv), dv, &mut packed_v));
        let steps = count.next_multiple_of(K::KEY_STEP);
        let mut scores = vec![T::Acc::ZERO; steps * panel];
        let mut peaks = vec![T::Acc::NEG_INFINITY; panel];
        K::scores((&packed_q, &packed_k), d, 0..vectors, 0..count, &mut scores, &mut peaks);
        for lane in 0..queries.min(panel) {
            let highest = (0..count).map(|j| scores[j * panel + lane].to_f64()).fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(peaks[lane].to_f64(), highest);
        }
        let raw = scores.clone();
        let mut acc = vec![T::Acc::ZERO; K::acc_rows(dv) * panel];
        for v in 0..vectors {
            let lanes = T::V::<I>::LANES;
            let peak = T::V::<I>::load(&peaks[v * lanes..]);
            let step = step::<T, I>(T::V::<I>::splat(T::Acc::NEG_INFINITY), peak);
            let mut column = Column { rows: &mut scores[v * lanes..], stride: panel };
            probabilities::<T, I, Exponential>(&mut column, 0..count, (T::V::<I>::splat(T::Acc::from_f64(1.0)), step.base), None);
        }
        let depth = <T::Kernel<I> as VectorKernel<T>>::DEPTH;
        assert_eq!(depth, K::DEPTH);
        let keys = 0..count;
        K::accumulate((&scores, &packed_v), dv, 0..vectors, keys, None, &mut acc);
        *self.out.borrow_mut() = (raw, acc, panel);
    }
}

fn check_products<T: SimdElement>(unit: f64, count: usize, d: usize, dv: usize, seed: u64) {
    let mut state = seed;
    let mut values = |len: usize| -> Vec<T> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                T::from_acc(T::Acc::from_f64((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0))
            })
            .collect()
    };
    let queries = 48;
    let (q, k, v) = (values(queries * d), values(count * d), values(count * dv));
    let (qf, kf, vf) = (f64s(&q), f64s(&k), f64s(&v));
    for level in Level::available() {
        let out = RefCell::default();
        run(level, &Products::<T> { q: &q, k: &k, v: &v, dims: (d, dv), out: &out });
        let (scores, acc, panel) = out.into_inner();
        for lane in 0..queries.min(panel) {
            let query = &qf[lane * d..][..d];
            let row: Vec<f64> = kf.chunks(d).map(|key| query.iter().zip(key).map(|(x, y)| x * y).sum()).collect();
            for (j, &want) in row.iter().enumerate() {
                let magnitude: f64 = query.iter().zip(&kf[j * d..]).map(|(x, y)| (x * y).abs()).sum();
                // Higham, Accuracy and Stability, 3.1: gamma_n times the sum of magnitudes; pairs flush denormals.
                let bound = (d + 1) as f64 * unit * magnitude + 1e-37;
                let got = scores[j * panel + lane].to_f64();
                assert!((got - want).abs() <= bound, "score {got} != {want} at {}", level.name());
            }
            let top = (0..count).map(|j| scores[j * panel + lane].to_f64()).fold(f64::NEG_INFINITY, f64::max);
            for dim in 0..dv {
                let weights: Vec<f64> = (0..count).map(|j| (scores[j * panel + lane].to_f64() - top).exp2()).collect();
                let want: f64 = weights.iter().enumerate().map(|(j, w)| w * vf[j * dv + dim]).sum();
                let magnitude: f64 = weights.iter().enumerate().map(|(j, w)| (w * vf[j * dv + dim]).abs()).sum();
                // The weights are rounded to the operands' type where those are pairs.
                let weight_error = if size_of::<T>() == 2 { 0.004 + 1e-4 } else { 1e-6_f64.max(unit) };
                let bound = (weight_error + (count + 1) as f64 * unit) * magnitude + 1e-37;
                let got = acc[dim * panel + lane].to_f64();
                assert!((got - want).abs() <= bound, "product {got} != {want} at {} count {count}", level.name());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn products_stay_within_their_bounds(count in 1usize..70, d in 1usize..140, dv in 1usize..140, seed: u64) {
        check_products::<f32>(EPS_F32 / 2.0, count, d, dv, seed);
        check_products::<f64>(f64::EPSILON / 2.0, count, d, dv, seed);
        check_products::<f16>(EPS_F32 / 2.0, count, d, dv, seed);
        check_products::<bf16>(EPS_F32 / 2.0, count, d, dv, seed);
    }
}

#[test]
fn log_sum_exp_of_nothing_is_minus_infinity() {
    assert_eq!(log_sum_exp(f32::NEG_INFINITY, 0.0), f32::NEG_INFINITY);
    assert!((log_sum_exp(3.0f64, 2.0) - 4.0 * std::f64::consts::LN_2).abs() < 1e-15);
}

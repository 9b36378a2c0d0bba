//! Chunks and steps against the definition, under every decay and rule.

use crate::case::{Case, Fades, Writes, shape};
use crate::compare::compare;
use crate::stream::widen;
use half::bf16;
use subquad::dtype::Element;
use subquad::kernels::recurrent::{Form, Sequence, forward, naive};
use subquad::simd::{Level, SimdElement, Wide};

impl<T: SimdElement> Case<T>
where
    T::Acc: Wide,
{
    fn check(&self, gate: f64, tolerance: f64) {
        let want = self.run(false, naive::forward);
        for level in Level::available() {
            for form in [Form::Auto, Form::Steps, Form::Chunks(16), Form::Chunks(32), Form::Chunks(64)] {
                let run = |threads, in_place| self.run(in_place, |args, out| forward(args, out, form, level, threads));
                let (got, again) = (run(1, false), run(3, true));
                let what = format!("{:?} {:?} {gate} {:?} {} {form:?}", self.fades, self.writes, self.shape, level.name());
                compare(&widen(&got.0), &widen(&want.0), tolerance, &format!("out, {what}"));
                compare(&widen(&got.1), &widen(&want.1), tolerance, &format!("state, {what}"));
                assert_eq!(bits(&got.0), bits(&again.0), "threads or places change bits: {what}");
                assert_eq!(bits(&got.1), bits(&again.1), "threads or places change bits: {what}");
            }
        }
    }
}

fn bits<T: Element>(x: &[T]) -> &[u8] {
    bytemuck::cast_slice(x)
}

fn sweep<T: SimdElement>(tolerance: f64)
where
    T::Acc: Wide,
{
    let all = [Writes::Values, Writes::ScaledValues, Writes::ValuesWithBonus, Writes::Corrections, Writes::LowRank];
    for shape in
        [shape(1, (1, 1), (8, 8)), shape(7, (2, 4), (16, 20)), shape(65, (1, 2), (60, 33)), shape(130, (1, 1), (128, 64))]
    {
        for fades in [Fades::Never, Fades::ByHead, Fades::ByStep, Fades::ByChannel] {
            for writes in all {
                for gate in if fades == Fades::Never { &[0.0][..] } else { &[1e-6, 0.3, 30.0] } {
                    Case::<T>::new(shape, (fades, writes), *gate).check(*gate, tolerance);
                }
            }
        }
    }
}

#[test]
fn every_decay_and_rule_in_double_precision() {
    sweep::<f64>(1e-12);
}

#[test]
fn every_decay_and_rule() {
    sweep::<f32>(1e-5);
}

#[test]
fn every_decay_and_rule_in_half_precision() {
    sweep::<bf16>(1e-2);
}

#[test]
fn what_is_written_back_has_no_errors_of_half_precision() {
    for fades in [Fades::Never, Fades::ByHead, Fades::ByStep, Fades::ByChannel] {
        let case = Case { l2norm: true, ..Case::<bf16>::new(shape(200, (1, 2), (72, 40)), (fades, Writes::Corrections), 0.01) };
        let want = case.run(false, naive::forward).1;
        for level in Level::available() {
            let got = case.run(false, |args, out| forward(args, out, Form::Auto, level, 2)).1;
            compare(&widen(&got), &widen(&want), 5e-5, &format!("state, {fades:?} {}", level.name()));
        }
    }
}

#[test]
fn corrections_that_cancel_leave_outputs_with_their_rounding_alone() {
    for (keys, values) in [(1, 8), (8, 16), (40, 24)] {
        let mut case = Case {
            l2norm: true,
            ..Case::<bf16>::new(shape(60, (1, 2), (keys, values)), (Fades::Never, Writes::Corrections), 0.0)
        };
        case.beta.fill(2.0);
        let want = case.run(false, naive::forward).0;
        for level in Level::available() {
            for form in [Form::Auto, Form::Chunks(64), Form::Steps] {
                let got = case.run(false, |args, out| forward(args, out, form, level, 2)).0;
                compare(&widen(&got), &widen(&want), 4.1e-3, &format!("{keys} {values} {form:?} {}", level.name()));
            }
        }
    }
}

#[test]
fn lengths_and_orders_of_states() {
    for (l2norm, v_first) in [(true, false), (false, true), (true, true)] {
        for seqlen in [5, 70] {
            let case = Case::<f64>::new(shape(seqlen, (1, 2), (20, 12)), (Fades::ByStep, Writes::Corrections), 0.5);
            Case { l2norm, v_first, ..case }.check(0.5, 1e-12);
        }
    }
}

#[test]
fn squares_of_rows_may_overflow() {
    for writes in [Writes::Values, Writes::Corrections] {
        let mut case = Case { l2norm: true, ..Case::<bf16>::new(shape(90, (1, 2), (72, 40)), (Fades::ByStep, writes), 0.1) };
        for rows in [&mut case.q, &mut case.k] {
            for row in rows.chunks_exact_mut(72).skip(3).step_by(7) {
                for x in row {
                    *x = bf16::from_f64(x.to_f64() * 100f64.exp2());
                }
            }
        }
        case.check(0.1, 1e-2);
    }
}

#[test]
fn what_is_not_finite_does_not_reach_back() {
    let (bad, row) = (75, 40);
    for writes in [Writes::Values, Writes::ScaledValues, Writes::Corrections] {
        let clean = Case::<bf16>::new(shape(bad + 20, (1, 1), (32, row)), (Fades::ByStep, writes), 0.3);
        let sequences = vec![Sequence { batch: 0, first: 0, len: bad + 20 }];
        let clean = Case { sequences, ..clean };
        for level in Level::available() {
            for poison in [f32::NAN, f32::INFINITY] {
                let mut case = clean.clone();
                case.v[bad * row] = bf16::from_f32(poison);
                let [got, want] =
                    [&case, &clean].map(|case| case.run(false, |args, out| forward(args, out, Form::Auto, level, 1)).0);
                let before = bad * row;
                compare(&widen(&got[..before]), &widen(&want[..before]), 1e-2, &format!("{writes:?} {poison} {}", level.name()));
                assert!(!got[before].is_finite(), "{writes:?} {poison} {}", level.name());
            }
        }
    }
}

#[test]
fn infinite_gates_forget() {
    for fades in [Fades::ByStep, Fades::ByChannel] {
        for writes in [Writes::Values, Writes::Corrections, Writes::LowRank] {
            let mut case = Case::<f32>::new(shape(70, (1, 1), (20, 16)), (fades, writes), 0.3);
            for (i, gate) in case.gates.iter_mut().enumerate() {
                if i % 23 == 4 {
                    *gate = f32::NEG_INFINITY;
                }
            }
            case.check(f64::INFINITY, 1e-5);
        }
    }
}

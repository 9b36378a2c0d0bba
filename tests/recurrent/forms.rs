//! Chunks and steps against the definition, under every decay and rule.

use crate::case::{Case, Fades, Writes, shape};
use crate::compare::compare;
use crate::stream::widen;
use half::bf16;
use subquad::dtype::Element;
use subquad::kernels::recurrent::{Form, forward, naive};
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
fn lengths_and_orders_of_states() {
    for (l2norm, v_first) in [(true, false), (false, true), (true, true)] {
        for seqlen in [5, 70] {
            let case = Case::<f64>::new(shape(seqlen, (1, 2), (20, 12)), (Fades::ByStep, Writes::Corrections), 0.5);
            Case { l2norm, v_first, ..case }.check(0.5, 1e-12);
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

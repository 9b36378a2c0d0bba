//! Numbers for tests.

use subquad::dtype::{Element, Float};

/// A stream of values in `[-1, 1)`: the tests need variety, not randomness.
pub struct Stream(pub u64);
impl Stream {
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
    pub fn fill<T: Element>(&mut self, len: usize, width: f64) -> Vec<T> {
        (0..len).map(|_| T::from_acc(T::Acc::from_f64(self.next() * width))).collect()
    }
}

pub fn widen<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_acc().to_f64()).collect()
}

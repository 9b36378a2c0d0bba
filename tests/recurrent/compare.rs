//! Errors in units of the largest number.

pub fn compare(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-3, |most: f64, y| most.max(y.abs()));
    for (i, (x, y)) in got.iter().zip(want).enumerate() {
        assert!((x - y).abs() <= tolerance * largest, "[{i}] {x} != {y}: {what}");
    }
}

//! Philox 4x32-10: random numbers by counter (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const INCREMENTS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// Four numbers for each of `N` counters; word `w` of counter `i` is `counters[w][i]`.
#[inline(always)]
pub fn philox<const N: usize>(mut counters: [[u32; N]; 4], seed: u64) -> [[u32; N]; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..ROUNDS {
        let [a, b, c, d] = counters;
        for i in 0..N {
            let (first, second) = (u64::from(MULTIPLIERS[0]) * u64::from(a[i]), u64::from(MULTIPLIERS[1]) * u64::from(c[i]));
            counters[0][i] = (second >> 32) as u32 ^ b[i] ^ key[0];
            counters[1][i] = second as u32;
            counters[2][i] = (first >> 32) as u32 ^ d[i] ^ key[1];
            counters[3][i] = first as u32;
        }
        key = [key[0].wrapping_add(INCREMENTS[0]), key[1].wrapping_add(INCREMENTS[1])];
    }
    counters
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the authors' Random123 library.
    #[test]
    fn known_answers() {
        let one = |counter: [u32; 4], key: [u32; 2]| {
            philox(counter.map(|word| [word]), u64::from(key[1]) << 32 | u64::from(key[0])).map(|[word]| word)
        };
        assert_eq!(one([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(one([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(one(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }
}

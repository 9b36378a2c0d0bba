//! `step_sizes` of `recurrent`: what gates and factors are made of, as the engine reads them.

use super::array::Array;
use super::named::Named;
use crate::error::Error;
use crate::kernels::recurrent::StepSizes;
use pyo3::prelude::*;

/// What `beta`, which is step sizes then, is made into: the factors of what is written, and, times a rate of each head, the gates.
pub struct Making {
    rates: Vec<f64>,
    bias: Option<Vec<f64>>,
    softplus: bool,
    limits: [f64; 2],
}

impl Making {
    /// Reads the options of that, if there are rates.
    ///
    /// # Errors
    /// Those of the arrays; [`Error::Shape`] for others than one number for each head; [`Error::Value`] where gates could be above 0, are
    /// given, or there are no step sizes.
    pub fn read<'py>(
        named: &Named<'_, 'py>,
        like: &Array<'py>,
        heads: usize,
        (has_steps, gates): (bool, Option<&&'static str>),
    ) -> PyResult<Option<Self>> {
        let vector = |arg| named.numbers(arg, like, &[heads]);
        let Some(rates) = vector("step_rates")? else { return Ok(None) };
        if !has_steps {
            let expected = "step sizes, as step_rates is given".into();
            return Err(Error::Value { arg: "beta", expected, got: "None".into() }.into());
        }
        if let Some(&arg) = gates {
            return Err(Error::Value { arg, expected: "None, as step_rates is given".into(), got: "an array".into() }.into());
        }
        let limits: (f64, f64) = named.get("step_limits")?.map_or(Ok((0.0, f64::INFINITY)), |limits| limits.extract())?;
        let expected = "natural logarithms of decays, 0 or below";
        if let Some(rate) = rates.iter().find(|rate| **rate > 0.0) {
            return Err(Error::Value { arg: "g", expected: expected.into(), got: format!("a rate of {rate}") }.into());
        }
        if limits.0 < 0.0 {
            return Err(Error::Value { arg: "g", expected: expected.into(), got: format!("steps from {} on", limits.0) }.into());
        }
        let softplus = named.flag("step_softplus")?;
        Ok(Some(Self { rates, bias: vector("step_bias")?, softplus, limits: limits.into() }))
    }

    /// Into factors of what is written.
    pub fn factors(&self) -> StepSizes<'_> {
        StepSizes { bias: self.bias.as_deref(), softplus: self.softplus, limits: self.limits, rates: None }
    }

    /// Into gates.
    pub fn gates(&self) -> StepSizes<'_> {
        StepSizes { rates: Some(&self.rates), ..self.factors() }
    }
}

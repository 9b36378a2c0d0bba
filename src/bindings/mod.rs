//! Python. The only home of `pyo3`: arguments become checked views, errors become exceptions, no arithmetic.

mod array;
mod attention;
mod backward;
mod broadcast;
mod convolution;
mod convolution_update;
mod dlpack;
mod enter;
mod errors;
mod gated_norm;
mod inputs;
mod integers;
mod kvcache;
mod masks;
mod merge;
mod named;
mod options;
mod probes;
mod recurrent;
mod recurrent_backward;
mod result;
mod runtime;
mod scan;
mod sdpa;
mod second;
mod selective;
mod step_sizes;
mod torch;
mod varlen;

use pyo3::prelude::*;

/// What Python can call.
#[pymodule(name = "_native", gil_used = false)]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("SCAN_CHUNK", crate::kernels::scan::CHUNK)?;
    module.add_function(wrap_pyfunction!(attention::attention, module)?)?;
    module.add_function(wrap_pyfunction!(backward::attention_backward, module)?)?;
    module.add_function(wrap_pyfunction!(second::attention_jvp, module)?)?;
    module.add_function(wrap_pyfunction!(second::attention_double_backward, module)?)?;
    module.add_function(wrap_pyfunction!(varlen::attention_varlen, module)?)?;
    module.add_function(wrap_pyfunction!(varlen::attention_varlen_backward, module)?)?;
    module.add_function(wrap_pyfunction!(kvcache::attention_with_kvcache, module)?)?;
    module.add_function(wrap_pyfunction!(merge::merge_attention, module)?)?;
    module.add_function(wrap_pyfunction!(recurrent::recurrent, module)?)?;
    module.add_function(wrap_pyfunction!(recurrent_backward::recurrent_backward, module)?)?;
    module.add_function(wrap_pyfunction!(recurrent::recurrent_and_kept, module)?)?;
    module.add_function(wrap_pyfunction!(convolution::causal_conv1d, module)?)?;
    module.add_function(wrap_pyfunction!(convolution::causal_conv1d_backward, module)?)?;
    module.add_function(wrap_pyfunction!(convolution_update::causal_conv1d_update, module)?)?;
    module.add_function(wrap_pyfunction!(selective::selective_scan, module)?)?;
    module.add_function(wrap_pyfunction!(selective::selective_scan_backward, module)?)?;
    module.add_function(wrap_pyfunction!(scan::selective_state_update, module)?)?;
    module.add_function(wrap_pyfunction!(scan::linear_scan, module)?)?;
    module.add_function(wrap_pyfunction!(scan::linear_scan_backward, module)?)?;
    module.add_function(wrap_pyfunction!(gated_norm::rms_norm_gated, module)?)?;
    module.add_function(wrap_pyfunction!(sdpa::scaled_dot_product_attention, module)?)?;
    module.add_function(wrap_pyfunction!(runtime::set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(runtime::get_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(runtime::config, module)?)?;
    module.add_function(wrap_pyfunction!(probes::probe_peak, module)?)?;
    module.add_function(wrap_pyfunction!(probes::probe_read, module)?)?;
    Ok(())
}

//! The target embeds Python, whose library may lie where the dynamic linker does not look.

fn main() {
    pyo3_build_config::add_libpython_rpath_link_args();
}

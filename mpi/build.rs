//! Says which package is missing before the build of the crate `mpi` fails without saying so.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=MPICC");
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    let advice = "`make mpi` installs it on Debian and Ubuntu (libopenmpi-dev openmpi-bin libclang-dev); on Fedora: openmpi-devel \
                  clang-devel, then `module load mpi`; with Homebrew: open-mpi llvm; on a cluster: load its MPI module";
    if let Err(reasons) = build_probe_mpi::probe() {
        let reasons: Vec<String> =
            reasons.iter().map(|reason| reason.to_string().replace('\n', " ")).collect();
        println!(
            "cargo::error=MPI was not found: {advice}. MPICC names a compiler wrapper that is not called mpicc."
        );
        println!("cargo::warning=what was tried: {}", reasons.join("; "));
    }
    if let Err(reason) = clang_sys::load() {
        let reason = reason.replace('\n', " ");
        println!(
            "cargo::error=libclang, which reads MPI's headers, was not found: {advice}. LIBCLANG_PATH names its folder."
        );
        println!("cargo::warning=what was tried: {reason}");
    }
}

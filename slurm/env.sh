# Sourced by slurm/train.sbatch, and by hand: what Arcus and Open MPI should find in their
# environment. Change it to suit the cluster; what is set already stands.

# Open MPI starts under srun through PMIx only; `srun --mpi=list` shows what a cluster has.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmix}"
# With Slurm's default (mixed) some ranks may leave MPI_Init before others listen, which then end with
# a segmentation fault: seen with Slurm 22.05 and Open MPI 4.1.4 on busy nodes.
export SLURM_PMIX_FENCE="${SLURM_PMIX_FENCE:-tree}"
# A rank that waits leaves its core to the others: many times faster where ranks share cores, and
# costs little elsewhere.
export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"
# Some builds of Open MPI warn about network components that find no hardware.
export OMPI_MCA_btl_base_warn_component_unused=0
# Containers that forbid reading another process's memory need this:
#   export OMPI_MCA_btl_vader_single_copy_mechanism=none

# Where Slurm does not bind ranks to cores, this tells them how many threads to use:
#   export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Modules of the cluster, if it has them:
#   module load gcc/12 openmpi/4.1

# The program: the build of the work tree that this file is in, or an installed one.
if [ -z "${ARCUS:-}" ]; then
  ARCUS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/build/release/arcus
  [ -x "$ARCUS" ] || ARCUS=arcus
fi
export ARCUS

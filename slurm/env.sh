# Sourced by the batch scripts here and by hand: what Arcus and Open MPI should find in their
# environment. Change it to suit the cluster.

# Open MPI starts under srun through PMIx only; `srun --mpi=list` shows what a cluster has.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmix}"
# A rank that waits leaves its core to the others. Needed wherever ranks share cores; costs little
# elsewhere.
export OMPI_MCA_mpi_yield_when_idle=1
# Some builds of Open MPI warn about network components that find no hardware.
export OMPI_MCA_btl_base_warn_component_unused=0
# Containers that forbid reading another process's memory need this:
#   export OMPI_MCA_btl_vader_single_copy_mechanism=none

# Modules of the cluster, if it has them:
#   module load gcc/12 openmpi/4.1

# The program: an installed one, or the build of this work tree.
export ARCUS="${ARCUS:-$(command -v arcus || echo "$PWD/build/release/arcus")}"

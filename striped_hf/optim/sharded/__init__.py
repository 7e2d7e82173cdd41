"""The step of sharded parameters: DTensors, of which every process has a part.

The stripes are the stripes of the whole matrix. A process sums the squares of its own part
(``statistics``). An all-reduce adds the other processes' sums of the same columns, or rows. The
roots of the whole stripes then update the process's own part (``update``). One all-reduce for each
mesh dimension carries the sums of all parameters. Momentum, its scales and the stripe along the
sharded dimension are sharded like the parameter; the other stripe is the same in every process.

For a matrix [..., R, C] with sharded rows the processes exchange its column sums [..., br, C] and
the sum of each block's row stripe, for mean(row); with sharded columns, its row sums. They exchange
no counts: every process knows the shape of the whole. A process with an empty part joins in.
``agreement`` checks that all processes exchange the same sums before any tensor changes.

If only leading dimensions are sharded, as in stacked experts, every matrix is whole in some
process, and its step is the ordinary one. So is the step of 0-D and 1-D parameters.
"""

/* The CPU backend: the arithmetic of reference.py with as few reads of memory as possible.
 *
 * The functions of this file get all entries of a param group and run one OpenMP parallel
 * region each. Between striped_statistics and striped_update the caller adds the sums of other
 * processes and computes the roots. striped_step does the whole step of whole parameters. The
 * entries' shapes alone decide how the work is cut into tasks of whole rows, and every sum is added
 * up in the order of the tasks. So the bits depend neither on the number of threads nor on the
 * assignment of tasks to threads.
 *
 * A matrix [..., R, C] with blocks (br, bc) consists of `bands` of `block_rows` = R / br rows, one
 * band for each row of blocks of each matrix. The column stripe is then [bands, C], and the row
 * stripe [bands * block_rows, bc].
 *
 * It differs from the reference in four ways. Sums of squares are added up in another order. The
 * mean of the row stripe is computed in double. Codes are multiplied by one factor instead of two
 * divisions, and averaged as b1 m + (1 - b1) g. And a compiler may fuse a multiplication with an
 * addition. So the last places of a parameter may differ. A momentum code may differ by one if its
 * value was at the border between two codes.
 *
 * There are no intrinsics: compilers can vectorize the loops, and function multiversioning chooses
 * the widest build that the processor can run. The code prefetches only a float32 gradient while it
 * sums it, and the parameter while it updates a row in several parts. The measured processors
 * prefetch everything else better by themselves.
 */

#include <omp.h>

#include "entry.h"
#include "plan.h"
#include "tasks.h"

/* The functions return 0, or 1 if there is no memory for a plan. Nothing has changed then. */

/* Sums the squares of the gradients of matrices by row and by column into row_sums and col_sums.
 *
 * fold: adds the gradients to momentum and sketch, too; NULL: does not.
 */
int striped_fold(Entry *entries, int64_t entry_count, const Settings *settings, int64_t threads,
                 const Fold *fold)
{
    Plan plan;
    if (make_plan(&plan, entries, entry_count, settings, 0))
        return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t b = 0; b < plan.bundle_count; b++) {
        const Task *tasks = plan.tasks + plan.bundles[b].first_task;
        int64_t count = plan.bundles[b].task_count;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const Entry *e = entries + tasks[i].entry;
            sum_task(e, tasks + i);
            if (fold)
                fold_task(e, tasks + i, settings, fold); /* its gradient is in a cache now */
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; i++) combine(entries + tasks[i].entry, tasks + i);
    }
    free_plan(&plan);
    return 0;
}

int striped_statistics(Entry *entries, int64_t entry_count, const Settings *settings,
                       int64_t threads)
{
    return striped_fold(entries, entry_count, settings, threads, NULL);
}

/* Updates momentum and parameters by row_roots and col_roots, and vectors' second moments. */
int striped_update(Entry *entries, int64_t entry_count, const Settings *settings, int64_t threads)
{
    Plan plan;
    if (make_plan(&plan, entries, entry_count, settings, 0))
        return 1;
    int64_t count = 0;
    for (int64_t b = 0; b < plan.bundle_count; b++) count += plan.bundles[b].task_count;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++)
        update_task(entries + plan.tasks[i].entry, plan.tasks + i, settings);
    free_plan(&plan);
    return 0;
}

/* Computes stripes and update of whole matrices whose gradients were folded.
 *
 * row_sums and col_sums are the sums of the gradients. The roots replace them in the same memory.
 */
int striped_step_folded(Entry *entries, int64_t entry_count, const Settings *settings,
                        int64_t threads)
{
    Plan plan;
    if (make_plan(&plan, entries, entry_count, settings, 0))
        return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t b = 0; b < plan.bundle_count; b++) {
        const Task *tasks = plan.tasks + plan.bundles[b].first_task;
        int64_t count = plan.bundles[b].task_count;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            average_task(entries + tasks[i].entry, tasks + i, settings);
            roots_task(entries + tasks[i].entry, tasks + i, settings);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; i++)
            update_task(entries + tasks[i].entry, tasks + i, settings);
    }
    free_plan(&plan);
    return 0;
}

/* Claims a task, unless another thread has claimed it; returns whether it is the caller's. */
static int claim(int *is_claimed)
{
    int was_claimed;
#pragma omp atomic capture
    {
        was_claimed = *is_claimed;
        *is_claimed = 1;
    }
    return !was_claimed;
}

/* Computes statistics, stripes and update in one pass.
 *
 * The thread that sums a task's squares also updates the task, unless it falls behind. Otherwise
 * cores that share no cache would fetch the gradient from each other.
 */
int striped_step(Entry *entries, int64_t entry_count, const Settings *settings, int64_t threads)
{
    Plan plan;
    if (make_plan(&plan, entries, entry_count, settings, 1))
        return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t b = 0; b < plan.bundle_count; b++) {
        Task *tasks = plan.tasks + plan.bundles[b].first_task;
        int64_t count = plan.bundles[b].task_count;
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t share = thread * count / team, share_end = (thread + 1) * count / team;
        for (int64_t k = 0; k < count; k++) { /* its share first, then tasks of other threads */
            Task *task = tasks + (share + k) % count;
            const Entry *e = entries + task->entry;
            if (!claim(&task->is_first_claimed))
                continue;
            if (is_lagged(e, settings))
                roots_task(e, task, settings);
            else
                sum_task(e, task);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const Entry *e = entries + tasks[i].entry;
            if (is_lagged(e, settings))
                continue;
            combine(e, tasks + i);
            average_task(e, tasks + i, settings);
            roots_task(e, tasks + i, settings);
        }
        for (int64_t k = 0; k < count; k++) { /* backwards: the last sums' gradients are near */
            Task *task = tasks + (share_end - 1 - k + count) % count;
            const Entry *e = entries + task->entry;
            if (!claim(&task->is_second_claimed))
                continue;
            if (is_lagged(e, settings))
                sum_task(e, task); /* only now, so that the update finds its gradient in a cache */
            update_task(e, task, settings);
        }
        if (!settings->lagged)
            continue;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; i++) {
            const Entry *e = entries + tasks[i].entry;
            if (!is_lagged(e, settings))
                continue;
            combine(e, tasks + i);
            average_task(e, tasks + i, settings);
        }
    }
    free_plan(&plan);
    return 0;
}

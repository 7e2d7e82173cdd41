/* Tasks: parts of an entry that one thread works on. */

#ifndef STRIPED_TASKS_H
#define STRIPED_TASKS_H

#include <stdint.h>
#include <string.h>

#include "entry.h"
#include "fold.h"
#include "stripes.h"
#include "sums.h"
#include "update.h"

/* Some rows of one band, or some whole bands; of a vector, some elements instead of rows. */
typedef struct {
    int64_t entry, band, bands, row, rows;
    float *partial; /* column sums of some rows, [columns]; NULL if the task has whole bands */
    int is_first_claimed, is_second_claimed; /* by a thread, in the two phases of striped_step */
} Task;

static int is_vector(const Entry *e) { return !e->is_matrix; }

static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

/* Cuts an entry into tasks, or only counts them if tasks == NULL.
 *
 * partials: memory for the column sums of tasks that are slices of a band.
 * *partial_elements: the number of these column sums.
 */
static int64_t cut(const Entry *e, int64_t entry, Task *tasks, float *partials,
                   int64_t *partial_elements)
{
    int64_t count = 0;
    *partial_elements = 0;
    if (!e->bands || !e->block_rows || !e->columns)
        return 0;
    if (is_vector(e)) {
        for (int64_t start = 0; start < e->columns; start += TASK_ELEMENTS, count++)
            if (tasks)
                tasks[count] = (Task){.entry = entry, .row = start,
                                      .rows = minimum(e->columns - start, TASK_ELEMENTS)};
        return count;
    }
    int64_t rows = TASK_ELEMENTS / e->columns;
    rows = rows < MIN_TASK_ROWS ? MIN_TASK_ROWS : minimum(rows, MAX_TASK_ROWS);
    if (rows >= e->block_rows) {
        int64_t together = TASK_ELEMENTS / (e->block_rows * e->columns);
        together = together < 1 ? 1 : together;
        for (int64_t band = 0; band < e->bands; band += together, count++)
            if (tasks)
                tasks[count] = (Task){.entry = entry, .band = band, .rows = e->block_rows,
                                      .bands = minimum(e->bands - band, together)};
        return count;
    }
    for (int64_t band = 0; band < e->bands; band++)
        for (int64_t row = 0; row < e->block_rows; row += rows, count++) {
            if (tasks)
                tasks[count] = (Task){.entry = entry, .band = band, .bands = 1, .row = row,
                                      .rows = minimum(e->block_rows - row, rows),
                                      .partial = partials + *partial_elements};
            *partial_elements += e->columns;
        }
    return count;
}

static void sum_task(const Entry *e, const Task *task)
{
    if (is_vector(e))
        return;
    if (task->partial) {
        memset(task->partial, 0, sizeof(float) * (size_t)e->columns);
        sum_rows(e, task->band * e->block_rows + task->row, task->rows, task->partial);
        return;
    }
    for (int64_t band = task->band; band < task->band + task->bands; band++) {
        float *col_sums = e->col_sums + band * e->columns;
        memset(col_sums, 0, sizeof(float) * (size_t)e->columns);
        sum_rows(e, band * e->block_rows, e->block_rows, col_sums);
    }
}

/* Adds up the column sums of a band's slices, in their order; called for the first slice. */
static void combine(const Entry *e, const Task *slice)
{
    if (!slice->partial || slice->row > 0)
        return;
    float *col_sums = e->col_sums + slice->band * e->columns;
    int64_t slices = (e->block_rows + slice->rows - 1) / slice->rows;
    for (int64_t j = 0; j < e->columns; j += CODE_BLOCK) {
        int64_t n = minimum(e->columns - j, CODE_BLOCK);
        double sums[CODE_BLOCK] = {0};
        for (int64_t i = 0; i < slices; i++) {
            const float *partial = slice->partial + i * e->columns + j;
            for (int64_t k = 0; k < n; k++) sums[k] += partial[k];
        }
        for (int64_t k = 0; k < n; k++) col_sums[j + k] = (float)sums[k];
    }
}

static int is_lagged(const Entry *e, const Settings *settings)
{
    return settings->lagged && e->step > 1 && !is_vector(e); /* no step is before the first */
}

/* Returns the number of bands for which a task does the work that is done once per band. The first
 * slice of a band does it.
 */
static int64_t whole_bands(const Entry *e, const Task *task)
{
    return is_vector(e) || task->row > 0 ? 0 : task->bands;
}

static void fold_task(const Entry *e, const Task *task, const Settings *settings, const Fold *fold)
{
    for (int64_t band = task->band; band < task->band + task->bands; band++)
        fold_rows(e, band * e->block_rows + task->row, task->rows, settings, fold);
}

static void average_task(const Entry *e, const Task *task, const Settings *settings)
{
    for (int64_t i = 0; i < whole_bands(e, task); i++) average_band(e, task->band + i, settings);
}

static void roots_task(const Entry *e, const Task *task, const Settings *settings)
{
    int64_t step = e->step - is_lagged(e, settings);
    for (int64_t i = 0; i < whole_bands(e, task); i++)
        compute_roots(e, task->band + i, settings, step);
}

static void update_task(const Entry *e, const Task *task, const Settings *settings)
{
    if (is_vector(e)) {
        update_vector(e, task->row, task->rows, settings);
        return;
    }
    for (int64_t band = task->band; band < task->band + task->bands; band++)
        update_rows(e, band, task->row, task->rows, settings);
}

#endif

/* Plans: the tasks of all entries, and memory to work in. */

#ifndef STRIPED_PLAN_H
#define STRIPED_PLAN_H

#include <stdint.h>
#include <stdlib.h>

#include "entry.h"
#include "tasks.h"

/* Consecutive entries whose gradients fit into a cache together, and their tasks. */
typedef struct {
    int64_t first_entry, entry_count, first_task, task_count;
} Bundle;

/* The tasks of all entries, in bundles, and memory for sums and roots. */
typedef struct {
    Task *tasks;
    Bundle *bundles;
    int64_t bundle_count;
    float *scratch;
} Plan;

static void free_plan(Plan *plan)
{
    free(plan->tasks);
    free(plan->bundles);
    free(plan->scratch);
}

static int64_t stripe_elements(const Entry *e)
{
    return is_vector(e) ? 0 : e->bands * (e->block_rows * e->column_blocks + e->columns);
}

/* Points an entry's sums and roots at scratch memory; returns the number of their elements. */
static int64_t assign_scratch(Entry *e, int lagged, float *scratch)
{
    int64_t rows = e->bands * e->block_rows * e->column_blocks, elements = stripe_elements(e);
    float *roots = lagged ? scratch + elements : scratch; /* not lagged: they replace the sums */
    e->row_sums = scratch;
    e->col_sums = scratch + rows;
    e->row_roots = roots;
    e->col_roots = roots + rows;
    return lagged ? 2 * elements : elements;
}

/* Cuts entries into bundles and tasks.
 *
 * place_sums: whether sums and roots are in scratch memory, too; else the entries point to them.
 *
 * Bundles use two scratch memories in turn. When all threads have met in a bundle, no thread works
 * on the bundle before it. But one may still work on this bundle when others work on the next.
 *
 * Returns 0, or 1 if there is no memory. There is nothing to free then.
 */
static int make_plan(Plan *plan, Entry *entries, int64_t entry_count, const Settings *settings,
                     int place_sums)
{
    *plan = (Plan){.bundles = malloc(sizeof(Bundle) * (size_t)(entry_count + 1))};
    if (!plan->bundles)
        return 1;
    int64_t count = 0, elements = 0, used = 0, most = 0, partials;
    for (int64_t k = 0; k < entry_count; k++) {
        const Entry *e = entries + k;
        if (elements == 0) {
            plan->bundles[plan->bundle_count++] = (Bundle){.first_entry = k, .first_task = count};
            used = 0;
        }
        Bundle *bundle = plan->bundles + plan->bundle_count - 1;
        count += cut(e, k, NULL, NULL, &partials);
        bundle->entry_count = k + 1 - bundle->first_entry;
        bundle->task_count = count - bundle->first_task;
        used += partials;
        if (place_sums)
            used += stripe_elements(e) * (is_lagged(e, settings) ? 2 : 1);
        most = used > most ? used : most;
        elements += e->bands * e->block_rows * e->columns;
        if (elements >= BUNDLE_ELEMENTS)
            elements = 0;
    }
    plan->tasks = malloc(sizeof(Task) * (size_t)(count + 1));
    plan->scratch = malloc(sizeof(float) * (size_t)(2 * most + 1));
    if (!plan->tasks || !plan->scratch) {
        free_plan(plan);
        return 1;
    }
    Task *tasks = plan->tasks;
    for (int64_t b = 0; b < plan->bundle_count; b++) {
        const Bundle *bundle = plan->bundles + b;
        float *scratch = plan->scratch + b % 2 * most;
        int64_t first = bundle->first_entry;
        for (int64_t k = first; k < first + bundle->entry_count; k++) {
            tasks += cut(entries + k, k, tasks, scratch, &partials);
            scratch += partials;
            if (place_sums && !is_vector(entries + k))
                scratch += assign_scratch(entries + k, is_lagged(entries + k, settings), scratch);
        }
    }
    return 0;
}

#endif

/* fg_fuse.c -- FUSE requests in slots, and the checks of their replies. */
#include <errno.h>
#include <string.h>

#include "fg_internal.h"

#define IN_HEADER 40u
#define OUT_HEADER 16u
#define FG_WRITE_HEAD 80u /* fuse_in_header and fuse_write_in */
#define SEGMENTS_MAX 512

uint64_t fg_page_at(const fg_queue *q, uint32_t page)
{
    return FG_SLOT_DATA + (uint64_t)q->page_order[page] * FG_PAGE;
}

/* The request stands in the slot already. */
int fg_slot_send(fg_queue *q, uint32_t slot, uint32_t in_len, int out_fixed, uint32_t data_bytes)
{
    struct fg_slot *s = &q->slots[slot];
    fg_segment seg[SEGMENTS_MAX];
    int n = 0;
    uint32_t header = in_len < IN_HEADER ? in_len : IN_HEADER;
    seg[n++] = (fg_segment){ s->gpa + FG_SLOT_IN, header, 0 };
    if (in_len > header)
        seg[n++] = (fg_segment){ s->gpa + FG_SLOT_IN + header, in_len - header, 0 };
    for (uint32_t at = 0, page = 0; at < s->in_data_bytes; at += FG_PAGE, page++) {
        uint32_t len = s->in_data_bytes - at < FG_PAGE ? s->in_data_bytes - at : FG_PAGE;
        seg[n++] = (fg_segment){ s->gpa + fg_page_at(q, page), len, 0 };
    }
    if (out_fixed >= 0)
        seg[n++] = (fg_segment){ s->gpa + FG_SLOT_OUT + FG_OUT_AT, OUT_HEADER, 1 };
    if (out_fixed > 0)
        seg[n++] = (fg_segment){ s->gpa + FG_SLOT_OUT + FG_OUT_FIXED_AT, (uint32_t)out_fixed, 1 };
    for (uint32_t at = 0, page = 0; at < data_bytes; at += FG_PAGE, page++) {
        uint32_t len = data_bytes - at < FG_PAGE ? data_bytes - at : FG_PAGE;
        seg[n++] = (fg_segment){ s->gpa + fg_page_at(q, page), len, 1 };
    }
    s->in_len = in_len;
    s->out_fixed = out_fixed;
    s->data_bytes = data_bytes;
    bool indirect = q->cfg.indirect && n > 1;
    s->table_bytes = indirect ? 16u * (uint32_t)n : 0;
    int head = fg_queue_add(q, seg, n, indirect ? s->gpa + FG_SLOT_TABLE : 0, slot);
    if (head >= 0)
        s->busy = true;
    return head < 0 ? head : 0;
}

int fg_submit(fg_queue *q, uint32_t slot, const uint8_t *in, uint32_t in_len, int out_fixed, uint32_t data_bytes)
{
    uint32_t in_data = 0;
    /* What does not fit beside the header goes to the data pages, as a kernel's WRITE does. */
    if (in_len > FG_SLOT_IN_MAX && data_bytes == 0) {
        in_data = in_len - FG_WRITE_HEAD;
        in_len = FG_WRITE_HEAD;
    }
    if (slot >= q->cfg.slot_count || q->slots[slot].busy || in_len == 0 || in_len > FG_SLOT_IN_MAX ||
        in_data > q->cfg.slot_data_bytes || in_data / FG_PAGE > SEGMENTS_MAX - 8 || out_fixed > FG_OUT_FIXED_MAX ||
        data_bytes > q->cfg.slot_data_bytes || data_bytes / FG_PAGE > SEGMENTS_MAX - 8)
        return fg_fail(q, -EINVAL, "slot %u busy, or request too large for it", slot);
    struct fg_slot *s = &q->slots[slot];
    memset(s->host, FG_FILL, FG_SLOT_DATA);
    memset(s->host + FG_SLOT_DATA, FG_FILL, q->cfg.slot_data_bytes + FG_PAGE);
    memcpy(s->host + FG_SLOT_IN, in, in_len);
    for (uint32_t at = 0, page = 0; at < in_data; at += FG_PAGE, page++)
        memcpy(s->host + fg_page_at(q, page), in + in_len + at, in_data - at < FG_PAGE ? in_data - at : FG_PAGE);
    s->in_data_bytes = in_data;
    s->unique = 0;
    if (in_len >= 16)
        memcpy(&s->unique, in + 8, 8);
    int rc = fg_slot_send(q, slot, in_len, out_fixed, data_bytes);
    if (rc)
        return rc;
    memcpy(q->shadow + (size_t)slot * FG_SLOT_OUT, s->host, FG_SLOT_OUT);
    fg_queue_publish(q);
    return 0;
}

int64_t fg_reply_length(fg_queue *q, struct fg_slot *s, uint32_t used_len, int32_t *error)
{
    uint32_t writable = s->out_fixed < 0 ? 0 : OUT_HEADER + (uint32_t)s->out_fixed + s->data_bytes;
    struct {
        uint32_t len;
        int32_t error;
        uint64_t unique;
    } h;
    if (used_len > writable)
        return fg_fail(q, -FG_BAD_LENGTH, "used.len %u of %u writable bytes", used_len, writable);
    *error = 0;
    memcpy(&h, s->host + FG_SLOT_OUT + FG_OUT_AT, sizeof h);
    if (used_len == 0 && q->cfg.header_len && h.unique == s->unique && h.len <= writable)
        used_len = h.len;
    if (used_len == 0)
        return 0;
    if (used_len < OUT_HEADER || h.len != used_len)
        return fg_fail(q, -FG_BAD_LENGTH, "used.len %u but out.len %u", used_len, h.len);
    if (h.unique != s->unique)
        return fg_fail(q, -FG_BAD_REPLY, "reply to unique %llu for request %llu", (unsigned long long)h.unique,
                       (unsigned long long)s->unique);
    if (h.error > 0 || h.error <= -512 || (h.error && h.len != OUT_HEADER))
        return fg_fail(q, -FG_BAD_REPLY, "error %d with %u bytes", h.error, h.len);
    *error = h.error;
    return used_len;
}

static bool all_fill(const uint8_t *p, uint64_t len)
{
    return len == 0 || (p[0] == FG_FILL && memcmp(p, p + 1, len - 1) == 0);
}

/* Nothing changed but the first `len` bytes of the writable part. */
static int check_untouched(fg_queue *q, uint32_t slot, uint32_t len)
{
    const struct fg_slot *s = &q->slots[slot];
    const uint8_t *out = s->host + FG_SLOT_OUT;
    uint32_t header = len < OUT_HEADER ? len : OUT_HEADER, left = len - header;
    uint32_t fixed = s->out_fixed < 0 ? 0 : left < (uint32_t)s->out_fixed ? left : (uint32_t)s->out_fixed;
    left -= fixed;
    if (memcmp(s->host, q->shadow + (size_t)slot * FG_SLOT_OUT, FG_SLOT_OUT) != 0)
        return fg_fail(q, -FG_OVERRUN, "request or indirect table was written to");
    uint32_t after_header = FG_OUT_AT + header, after_fixed = FG_OUT_FIXED_AT + fixed;
    if (!all_fill(out, FG_OUT_AT) || !all_fill(out + after_header, FG_OUT_FIXED_AT - after_header) ||
        !all_fill(out + after_fixed, FG_SLOT_DATA - FG_SLOT_OUT - after_fixed))
        return fg_fail(q, -FG_OVERRUN, "bytes beside the reply's header were written (reply %u bytes)", len);
    if (s->in_data_bytes)
        return 0; /* the pages are the request's */
    uint32_t pages = q->cfg.slot_data_bytes / FG_PAGE;
    for (uint32_t i = 0; i < pages; i++) {
        uint64_t from = (uint64_t)i * FG_PAGE, mine = left > from ? left - from : 0;
        mine = mine > FG_PAGE ? FG_PAGE : mine;
        if (!all_fill(s->host + fg_page_at(q, i) + mine, FG_PAGE - mine))
            return fg_fail(q, -FG_OVERRUN, "data page %u written past the reply's %u bytes", i, len);
    }
    if (!all_fill(s->host + FG_SLOT_DATA + q->cfg.slot_data_bytes, FG_PAGE))
        return fg_fail(q, -FG_OVERRUN, "page after the data was written");
    return 0;
}

int64_t fg_reap(fg_queue *q, uint32_t *slot, uint8_t *reply, uint64_t reply_cap, int timeout_ms)
{
    uint64_t cookie;
    uint32_t used_len;
    int32_t error;
    int rc;
    while ((rc = fg_queue_pop(q, &cookie, &used_len)) == 0)
        if ((rc = fg_queue_wait(q, timeout_ms)) < 0)
            return rc;
    if (rc < 0)
        return rc;
    if (cookie >= q->cfg.slot_count)
        return fg_fail(q, -EINVAL, "a raw chain completed: use fg_queue_pop");
    struct fg_slot *s = &q->slots[cookie];
    s->busy = false;
    *slot = (uint32_t)cookie;
    int64_t len = fg_reply_length(q, s, used_len, &error);
    if (len < 0)
        return len;
    rc = check_untouched(q, *slot, (uint32_t)len);
    if (rc)
        return rc;
    if (!reply)
        return len;
    if ((uint64_t)len > reply_cap)
        return fg_fail(q, -ENOBUFS, "reply of %lld bytes", (long long)len);
    uint64_t at = 0, left = (uint64_t)len;
    uint64_t header = left < OUT_HEADER ? left : OUT_HEADER;
    memcpy(reply, s->host + FG_SLOT_OUT + FG_OUT_AT, header);
    at += header, left -= header;
    uint64_t fixed = s->out_fixed > 0 && left ? (uint64_t)s->out_fixed : 0;
    fixed = fixed > left ? left : fixed;
    memcpy(reply + at, s->host + FG_SLOT_OUT + FG_OUT_FIXED_AT, fixed);
    at += fixed, left -= fixed;
    for (uint32_t page = 0; left; page++) {
        uint64_t n = left < FG_PAGE ? left : FG_PAGE;
        memcpy(reply + at, s->host + fg_page_at(q, page), n);
        at += n, left -= n;
    }
    return len;
}

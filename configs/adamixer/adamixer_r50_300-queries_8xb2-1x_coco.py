_base_ = './adamixer_r50_8xb2-1x_coco.py'

model = dict(query_generator=dict(num_queries=300))
